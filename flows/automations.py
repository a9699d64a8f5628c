"""Installs infra/automations.yaml at the Prefect server: `python -m flows.automations [FILE]`."""

import sys
from pathlib import Path

import yaml
from prefect import get_client
from prefect.events.schemas.automations import AutomationCore

from flows.presets import PROJECT

AUTOMATIONS = PROJECT / "infra" / "automations.yaml"


def main(path: Path = AUTOMATIONS) -> None:
    """Create each automation of a file, or bring the one of its name up to date."""
    with get_client(sync_client=True) as client:
        for record in yaml.safe_load(path.read_text(encoding="utf-8"))["automations"]:
            automation = AutomationCore.model_validate(record)
            there = client.read_automations_by_name(automation.name)
            for found in there:
                client.update_automation(found.id, automation)
            if not there:
                client.create_automation(automation)
            print(f"{automation.name}: {'brought up to date' if there else 'installed'}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
