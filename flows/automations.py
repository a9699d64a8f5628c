"""Installation of infra/automations.yaml on the Prefect server: `python -m flows.automations [FILE]`."""

import sys
from pathlib import Path

import yaml
from prefect import get_client
from prefect.events.schemas.automations import AutomationCore

from flows.presets import PROJECT

AUTOMATIONS = PROJECT / "infra" / "automations.yaml"


def main(path: Path = AUTOMATIONS) -> None:
    """Create each automation of a file, or update the existing one of the same name."""
    with get_client(sync_client=True) as client:
        for record in yaml.safe_load(path.read_text(encoding="utf-8"))["automations"]:
            automation = AutomationCore.model_validate(record)
            existing = client.read_automations_by_name(automation.name)
            for installed in existing:
                client.update_automation(installed.id, automation)
            if not existing:
                client.create_automation(automation)
            print(f"{automation.name}: {'updated' if existing else 'installed'}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
