"""Module names are unique, packages have no import cycles, and short modules have a stated reason."""

import ast
from collections import defaultdict
from pathlib import Path

from fm_core.command_options import STAGES
from tests.test_architecture import CORE, ROOT, imports_of, modules, name_of, package_of

SHORT = 60
"""A module of fewer lines needs a reason in SHORT_MODULES."""
SHORT_MODULES = {
    # The length of a configuration section depends only on its number of keys.
    "fm_core.config.export": "one section of the configuration",
    "fm_core.config.method": "one section of the configuration",
    "fm_core.config.online_eval": "one section of the configuration",
    "fm_core.config.performance": "one section of the configuration",
    "fm_core.config.report": "one section of the configuration",
    "fm_core.config.run": "one section of the configuration",
    "fm_core.config.sweep": "one section of the configuration",
    "fm_core.config.sizes": "a table of published sizes",
    "fm_core.reproduce.comparison_checks": "rules that need experiments and students",
    "fm_core.training.step_agreement": "the one collective of a step that is not the optimizer's",
    "fm_core.evaluation.recognition": "what the scores and the NFE curve share",
    "flows.automations": "a command of its own",
    "flows.parameters": "what the three flows with a configuration file or tree share",
    "flows.stages": "the four single-stage flows",
    "fm_core.status_line": "what fm status alone needs of the launchers, whose import takes time",
    "fm_core.stages.preflight": "what a flow that writes shards checks without importing torch",
    "fm_core.storage.staged_files": "names of files that are being written",
    "fm_core.checkpoint.train_state": "the schema of a file on disk",
    "fm_core.data.sources.pickled_batches": "an older family of files",
    "fm_core.data.wids_index": "the index format of another tool",
    "fm_core.evaluation.evaluation_worker": "entry point of the ranks",
    "fm_core.evaluation.features.open_extractor": "the only module that knows all extractors",
    "fm_core.evaluation.metrics.inception_score": "one metric",
    "fm_core.evaluation.further_scores": "one record, for runs and for images without a run",
    "fm_core.evaluation.scores_key": "one rule: what identifies a file of scores",
    "fm_core.evaluation.run_protocol": "one record; that of images without a run is in set_comparison",
    "fm_core.evaluation.torch_threads": "one rule that stages and comparisons share",
    "fm_core.launch.detached": "the one way to spawn a process that outlives its parent",
    "fm_core.launch.hostfile": "a file format of its own",
    "fm_core.launch.local": "one launcher",
    "fm_core.launch.rank_errors": "one table of errors that a restart cannot help",
    "fm_core.launch.run_jobs": "all jobs of a run, for cancellation",
    "fm_core.method.discrete_steps": "one polynomial, for the paths",
    "fm_core.method.time_pairs": "one draw, below the paths and the objectives that use it",
    "fm_core.method.times": "the former name of timestep_samplers, which plug-ins import",
    "fm_core.method.types": "type aliases that every module of the package imports",
    "fm_core.models.flops": "one count",
    "fm_core.reproduce.reproduce": "the entry point of the command",
    "fm_core.run.stage_functions": "what comparisons and sweeps are given instead of importing stages",
    "fm_core.report.memorization_table": "one table, for the report and the comparison",
    "fm_core.run.results": "the two result types",
    "fm_core.run.status": "the schema of a file on disk",
    "fm_core.sampling.compiled_network": "one wrapper",
    "fm_core.stages.compare": "a stage",
    "fm_core.storage.file_lock": "one rule, written once",
    "fm_core.storage.file_slice": "one class",
    "fm_core.storage.hashing": "one rule, written once",
    "fm_core.storage.remote_file": "one class",
    "fm_core.training.lr_schedule": "one function",
    "fm_core.training.mfu": "one measurement",
}
"""Short module -> why it is a file of its own."""


def package_or_flows(path: Path) -> str:
    name = name_of(path)
    return package_of(name) or name.split(".")[0]


def test_no_file_name_is_used_in_two_packages():
    """Sections of the configuration, and flows of stages, have the names of what they belong to."""
    packages: dict[str, set[str]] = defaultdict(set)
    for path in modules(CORE):
        package = package_or_flows(path)
        belongs_to_another = package == "config" or (package == "flows" and path.stem in STAGES)
        if path.stem != "__init__" and not belongs_to_another:
            packages[path.stem].add(package)
    assert {stem: names for stem, names in packages.items() if len(names) > 1} == {}


def test_no_file_name_is_used_twice_in_one_package():
    seen: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in modules(CORE, ROOT / "flows"):
        if path.stem != "__init__":
            seen[package_or_flows(path), path.stem].append(name_of(path))
    assert [names for names in seen.values() if len(names) > 1] == []


def test_no_public_class_name_is_defined_twice():
    classes: dict[str, list[str]] = defaultdict(list)
    for path in modules(CORE, ROOT / "flows"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(name_of(path))
    assert {name: places for name, places in classes.items() if len(places) > 1} == {}


def test_no_import_cycle_inside_a_package():
    """Imports inside functions count, so a cycle cannot be hidden by them."""
    names = {name_of(path) for path in modules(CORE, ROOT / "flows")}
    graph: dict[str, set[str]] = {}
    for path in modules(CORE, ROOT / "flows"):
        here, targets = name_of(path), set[str]()
        for imported in imports_of(path):
            module = imported if imported in names else imported.rpartition(".")[0]
            if module in names and package_or_flows_of(module) == package_or_flows_of(here):
                targets.add(module)
        graph[here] = targets - {here}
    finished: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"cycle: {' -> '.join([*above[above.index(module) :], module])}"
        if module not in finished:
            for target in sorted(graph[module]):
                visit(target, (*above, module))
            finished.add(module)

    for module in sorted(graph):
        visit(module, ())


def package_or_flows_of(module: str) -> str:
    return package_of(module) or module.split(".")[0]


def test_short_modules_have_a_reason():
    short = {
        name_of(path)
        for path in modules(CORE, ROOT / "flows")
        if path.stem not in ("__init__", "__main__") and len(path.read_text().splitlines()) < SHORT
    }
    assert short - SHORT_MODULES.keys() == set(), "merge them, or give each a reason"
    assert SHORT_MODULES.keys() - short == set(), "these are no longer short"
