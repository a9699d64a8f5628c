"""Distribution of the tests over the processes of a session: which belong together, and which begin first."""

from collections.abc import Sequence
from functools import cached_property

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

DEMO = tuple(
    f"tests/flows/test_{name}.py"
    for name in ("demo", "flow_runs", "prefect_plugin", "readme", "operators_page", "prefect_ui")
)
"""Modules that share the server of one demo."""
SHARED = {"the demo": DEMO, "the comparison": ("tests/reproduce/",)}
"""Groups of tests that share a server or a comparison; elsewhere the unit of scheduling is a module."""
LONGEST = (
    *DEMO,
    "tests/flows/test_long_run.py",
    "tests/cluster/",
    "tests/stages/test_resumed_training.py",
    "tests/stages/test_pipeline.py",
    "tests/flows/test_flow_in_process.py",
    "tests/stages/",
    "tests/training/",
    "tests/reproduce/",
    "tests/flows/",
    "tests/benchmarks/",
    "tests/launch/",
)
"""What begins first, so that no process is left alone with a long group at the end."""
WAITING = {
    *(
        "tests/flows/test_long_run.py",
        "tests/flows/test_interrupted_demo.py",
        "tests/flows/test_team_server.py",
    ),
    *("tests/cluster/test_slurm.py", "tests/cluster/test_ssh.py", "tests/cluster/test_object_store.py"),
    *("tests/launch/test_pid_namespaces.py", "tests/launch/test_supervisor.py"),
    *("tests/launch/test_job_ownership.py", "tests/data/test_object_storage.py"),
    *("tests/stages/test_upload_handover.py", "tests/stages/test_training_on_failing_disks.py"),
    *("tests/flows/test_flow_in_process.py", "tests/flows/test_loaded_flows.py"),
    *("tests/infra/test_serve.py", "tests/infra/test_entrypoint.py", "tests/run/test_lease.py"),
}
"""Groups that mostly wait: for Slurm's intervals, for silence to be noticed, for pauses before restarts."""


def longest_first(items: list[pytest.Item]) -> None:
    """Sort tests, in place, in the order in which their groups are to begin."""
    order = {path: number for number, path in enumerate(LONGEST)}
    items.sort(  # stable
        key=lambda item: next((n for path, n in order.items() if item.nodeid.startswith(path)), len(order))
    )


class Grouped(LoadScopeScheduling):
    """Scheduling of complete groups. (The plugin's own groups are not honored under pytest 9.2.)

    With `--waiting-process` the last process takes only groups that mostly wait, so that the others, one for
    each core, have work all the time; they take what is left of them in the end.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return next((group for group, paths in SHARED.items() if file.startswith(paths)), file)

    def _assign_work_unit(self, node: WorkerController) -> None:
        group = self._next_group(node, list(self.workqueue))
        if group is None:
            node.shutdown()
            return
        self.workqueue.move_to_end(group, last=False)
        super()._assign_work_unit(node)

    def _next_group(self, node: WorkerController, groups: Sequence[str]) -> str | None:
        if not self.config.getoption("--waiting-process") or len(self.nodes) == 1:
            return groups[0]
        waiting = node is self._waiting_node
        preferred = [group for group in groups if (group in WAITING) == waiting]
        return next(iter(preferred), None if waiting else groups[0])

    @cached_property
    def _waiting_node(self) -> WorkerController:
        """The last process of all that began: after its end, none of the others takes its place."""
        return max(self.nodes, key=lambda node: int(node.gateway.id.removeprefix("gw")))
