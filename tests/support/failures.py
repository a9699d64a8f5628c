"""What may fail around a run, what follows, and the tests that cause it (infra/docs/operations.md).

python -m tests.support.failures    write the table into the page
"""

import ast
from dataclasses import dataclass

from tests.support import ROOT

PAGE = ROOT / "infra" / "docs" / "operations.md"
BEGIN, END = "<!-- made by python -m tests.support.failures -->\n", "<!-- end of the table -->\n"
HEAD = "| what fails | what happens | at worst | tests |\n|---|---|---|---|\n"


@dataclass(frozen=True, init=False)
class Failure:
    """A row of the table."""

    what: str
    happens: str
    worst: str
    """What it costs in the worst case."""
    tests: tuple[str, ...]
    """Tests that cause it, as FILE::FUNCTION below tests/."""

    def __init__(self, what: str, happens: str, worst: str, *tests: str):
        for name, value in {"what": what, "happens": happens, "worst": worst, "tests": tests}.items():
            object.__setattr__(self, name, value)

    def row(self) -> str:
        """The row as Markdown; the tests are linked and read as sentences."""
        links = []
        for test in self.tests:
            file, function = test.split("::")
            links.append(f"[{function.removeprefix('test_').replace('_', ' ')}](../../tests/{file})")
        return f"| {self.what} | {self.happens} | {self.worst} | {'; '.join(links)} |\n"


FAILURES = (
    Failure(
        "the process of the flow run is killed",
        "the run is Crashed immediately and restarted half a minute later; it attaches to the job",
        "no training is lost; nobody supervises the job for about a minute",
        "flows/test_long_run.py::test_a_killed_flow_process_is_replaced_and_the_next_one_attaches",
    ),
    Failure(
        "the worker is killed with SIGKILL",
        "the run continues and can be cancelled; new runs wait for a worker",
        "no interruption",
        "flows/test_long_run.py::test_a_run_whose_worker_is_gone_is_cancelled",
    ),
    Failure(
        "the worker gets SIGTERM or Ctrl-C",
        "its runs save, are Crashed, and continue when a worker is available",
        "a run that cannot save within 50 seconds trains the steps since its newest checkpoint again",
        "flows/test_prefect_plugin.py::test_a_worker_that_is_ended_lets_its_runs_save_first",
        "flows/test_long_run.py::test_a_worker_that_gets_sigterm_lets_its_run_save_and_the_next_worker_continues_it",
    ),
    Failure(
        "worker, flow run and host are gone",
        "the run is Crashed after ten minutes without a heartbeat, and restarted from the newest checkpoint",
        "twelve minutes and the steps since that checkpoint (computed; with 45 seconds of "
        "silence: less than three minutes)",
        "flows/test_long_run.py::test_a_host_that_falls_silent_is_noticed_and_a_second_configuration_refused",
    ),
    Failure(
        "the Prefect server is unavailable",
        "training is not affected; logs and artifacts catch up within a minute after it is available again",
        "no interruption",
        "flows/test_long_run.py::test_training_does_not_notice_that_the_server_is_unavailable",
        "flows/test_progress_report.py::test_the_artifact_catches_up_with_a_server_that_was_unavailable_for_two_minutes",
    ),
    Failure(
        "one rank or all ranks are killed",
        "the job restarts from the newest checkpoint, at most `launch.restarts` times in a row; a"
        " new checkpoint in between resets the count",
        "the steps since the newest checkpoint that was written completely, and `launch.restart_seconds`, "
        "doubled at each further restart",
        "flows/test_long_run.py::test_all_ranks_killed_at_once_are_named_and_training_goes_on",
        "stages/test_resumed_training.py::test_a_killed_rank_is_named_and_the_job_is_restarted_automatically",
        "stages/test_resumed_training.py::test_a_rank_killed_while_it_sends_leaves_the_checkpoint_before_and_the_run_goes_on",
    ),
    Failure(
        "the launcher is killed",
        "its ranks save and exit; the job is restarted",
        "as for a killed rank, if they cannot save",
        "flows/test_long_run.py::test_the_command_of_the_message_continues_and_a_killed_launcher_is_replaced",
    ),
    Failure(
        "a rank hangs",
        "the job fails after `train.hang_seconds` without progress, names the rank and its host, "
        "and is restarted",
        "`train.hang_seconds` and the steps since the newest checkpoint",
        "stages/test_training_in_a_store.py::test_a_rank_that_hangs_is_named_with_its_host_and_nothing_is_left",
    ),
    Failure(
        "the object store of the checkpoints is unavailable",
        "training continues and uploads when the store is available; a job that starts in the meantime"
        " is restarted as after a killed rank",
        "if this host is lost as well: the steps since the newest uploaded checkpoint",
        "checkpoint/test_uploader.py::test_a_store_that_is_unavailable_stops_nothing_and_gets_the_newest_when_it_is_back",
        "stages/test_training_in_a_store.py::test_a_store_that_is_unavailable_at_the_start_is_waited_for",
    ),
    Failure(
        "a host or container is frozen, suspended or cut off from the run directory",
        "a start on another host takes over after half a minute without a heartbeat. When the "
        "frozen job continues, it detects the new epoch in the lock and exits within seconds "
        "with status 1, without writing anything",
        "the steps since the newest checkpoint, and half a minute",
        "launch/test_pid_namespaces.py::test_a_frozen_container_that_thaws_ends_its_job_and_leaves_that_of_its_successor_alone",
        "launch/test_lease_of_a_job.py::test_a_job_that_was_replaced_ends_without_touching_the_directory",
        "checkpoint/test_fencing.py::test_nothing_of_the_successor_is_lost_locally",
    ),
    Failure(
        "processes are stopped (SIGSTOP) on the host of the next start",
        "they hold the directory while they exist: a start on that host attaches to them. "
        "Continue them (`kill -CONT`) or stop the run as usual",
        "until an operator acts",
        "run/test_lease.py::test_a_frozen_process_of_this_host_holds_its_lease",
    ),
    Failure(
        "a container is recreated",
        "it waits half a minute for the heartbeat of its predecessor, reports that, and takes over",
        "half a minute",
        "launch/test_pid_namespaces.py::test_a_container_that_is_recreated_waits_and_takes_over",
    ),
    Failure(
        "the clock is set",
        "nothing: processes are identified by their start in ticks since boot, and other hosts by"
        " changes of their heartbeat",
        "no interruption",
        "run/test_lease.py::test_a_step_of_the_clock_changes_nothing_for_a_process_of_this_host",
        "run/test_lease.py::test_a_holder_elsewhere_is_alive_if_its_record_changes_whatever_its_clock",
    ),
    Failure(
        "the disk of the checkpoints is full, read-only or unmounted while training",
        "training continues; the log and `fm status` report it, and the next checkpoint is attempted at "
        "its interval. Only where the last one, or that of a stop, cannot be written, the job "
        "ends and is restarted",
        "until there is space again, the steps since the newest checkpoint are at risk",
        "stages/test_training_on_failing_disks.py::test_a_full_disk_of_checkpoints_costs_one_checkpoint",
        "stages/test_training_on_failing_disks.py::test_a_disk_that_is_unavailable_while_training_costs_one_checkpoint",
    ),
    Failure(
        "the disk is slow",
        "a save that makes progress is not a hang, however long it takes",
        "the next save, and a stop, wait until the one before is written",
        "stages/test_training_on_failing_disks.py::test_a_save_that_makes_progress_is_not_a_hang_however_long_it_takes",
    ),
    Failure(
        "the checkpoints are missing when a job starts (unmounted disk, wrong `train.checkpoint_root`)",
        "the job is restarted, as for a store, and never starts at step 0",
        "until they are available",
        "stages/test_training_on_failing_disks.py::test_a_run_whose_disk_is_unavailable_does_not_begin_again",
        "stages/test_training_on_failing_disks.py::test_a_run_that_had_a_checkpoint_does_not_begin_again",
    ),
    Failure(
        "another disk is mounted where the checkpoints were",
        "it is refused: its `OWNER.json` is missing or names another run",
        "until an operator acts",
        "checkpoint/test_ownership.py::test_another_disk_in_its_place_is_not_written_to",
    ),
    Failure(
        "the disk of the run directory is full or unmounted while training",
        "training continues; metrics are kept in memory and written later; a checkpoint becomes"
        " valid only after the metrics that it covers are on the disk",
        "as for the disk of the checkpoints",
        "stages/test_training_on_failing_disks.py::test_a_full_run_directory_costs_no_line_of_metrics",
    ),
    Failure(
        "power failure",
        "nothing complete is lost: data are synchronized before they get their name",
        "as for a lost host",
        "storage/test_atomic_files.py::test_the_new_content_is_on_the_disk_before_it_has_the_name",
        "checkpoint/test_killed_anywhere.py::test_a_local_save_with_retention_leaves_the_old_or_the_new_newest",
        "checkpoint/test_killed_anywhere.py::test_a_save_beside_training_leaves_the_old_or_the_new_newest",
    ),
    Failure(
        "the disk is full when a failed job is restarted",
        "the restart is tried again until there is space and does not count",
        "five minutes after there is space",
        "launch/test_supervision_errors.py::test_a_restart_waits_for_a_full_disk_and_no_attempt_is_lost",
    ),
    Failure(
        "a poll of the job, `squeue` or `scancel` fails",
        "one warning; the next poll tries again; the job counts as running",
        "no interruption",
        "launch/test_supervision_errors.py::test_a_poll_that_fails_is_reported_once_and_the_job_goes_on",
    ),
    Failure(
        "a report of progress fails",
        "one warning; tried again the next time",
        "no interruption",
        "launch/test_supervision_errors.py::test_an_observer_that_fails_does_not_end_the_job",
    ),
    Failure(
        "`status.json`, `restarts.jsonl` or `stages.jsonl` cannot be read or written",
        "one warning; tried again the next time",
        "no interruption",
        "launch/test_supervision_errors.py::test_a_restart_is_not_lost_to_a_record_that_cannot_be_written",
    ),
    Failure(
        "the terminal, the pipe or the disk of standard output is gone (`fm train 2>&1 \\| head -3`)",
        "what cannot be written is dropped; the exit status is that of the stage",
        "lost output",
        "launch/test_closed_pipe.py::test_a_reader_that_has_ended_does_not_end_the_job",
    ),
    Failure(
        "a host of an ssh job is lost",
        "the ranks of all hosts end, the host is named, and the job is restarted",
        "the steps since the newest checkpoint; waits until the host is back",
        "cluster/test_ssh.py::test_kill_9_of_all_on_one_host_ends_the_job_and_names_the_host",
    ),
    Failure(
        "the network between two hosts is cut",
        "the job fails with a message that names the hosts, and is restarted",
        "as for a lost host",
        "cluster/test_ssh.py::test_a_network_cut_is_a_clear_failure_and_the_run_goes_on_after_it",
    ),
    Failure(
        "a node of a Slurm job is lost",
        "the job ends, is submitted again, and runs when the node is back",
        "as for a lost host",
        "cluster/test_slurm.py::test_a_node_that_is_lost_ends_the_job_and_it_goes_on_when_the_node_is_back",
    ),
    Failure(
        "the kernel kills a rank for lack of memory",
        "the message says so, and the job is restarted as after a killed rank",
        "as for a killed rank",
        "launch/test_supervision_errors.py::test_an_out_of_memory_kill_is_named",
    ),
)


def table() -> str:
    """The table as Markdown."""
    return HEAD + "".join(failure.row() for failure in FAILURES)


def page_with_table(page: str) -> str:
    """The page with its table replaced by that of FAILURES."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def functions_of(file: str) -> set[str]:
    """Names of the test functions of a file below tests/."""
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
