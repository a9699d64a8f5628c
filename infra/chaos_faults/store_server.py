"""A local S3 server, in its own process and, if possible, its own network namespace.

`python -m infra.chaos_faults.store_server ADDRESS SNAPSHOTS` reads commands from its standard input: start,
stop, dump FOLDER. It answers each with a line, and appends a line to SNAPSHOTS whenever the complete
checkpoints in the bucket change.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infra.chaos_faults.checkpoint_watch import (
    CompleteCheckpoint,
    RetentionWatch,
    Snapshot,
    complete_checkpoint,
)
from infra.chaos_faults.namespaces import is_isolated, run

BUCKET, FOLDER = "chaos", "checkpoints"
URL = f"s3://{BUCKET}/{FOLDER}"
ADDRESS, PEER = "10.98.7.2", "10.98.7.1"
KEY = re.compile(rf"{FOLDER}/(?P<aside>set-aside-)?step-(?P<step>\d+)[^/]*/COMPLETE(?P<removing>\.removing)?")
INTERVAL_SECONDS = 0.05


class ObjectStore:
    """The server, as controlled by the chaos test."""

    def __init__(self, folder: Path) -> None:
        """Start it; its objects exist only as long as its process."""
        folder.mkdir(parents=True, exist_ok=True)
        self.snapshots = folder / "store.jsonl"
        self.cable = is_isolated()
        address = ADDRESS if self.cable else "127.0.0.1"
        command = [sys.executable, "-m", "infra.chaos_faults.store_server", address, str(self.snapshots)]
        with (folder / "store.log").open("wb") as log:
            self.process = subprocess.Popen(
                ["unshare", "--net", *command] if self.cable else command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                cwd=Path(__file__).resolve().parents[2],
            )
        self._read()
        if self.cable:
            inside = ("nsenter", "--net", "--target", self.process.pid)
            run(
                "ip",
                "link",
                "add",
                "store",
                "type",
                "veth",
                "peer",
                "name",
                "cable",
                "netns",
                self.process.pid,
            )
            run("ip", "address", "add", f"{PEER}/24", "dev", "store")
            run("ip", "link", "set", "store", "up")
            run(*inside, "ip", "link", "set", "lo", "up")
            run(*inside, "ip", "address", "add", f"{ADDRESS}/24", "dev", "cable")
            run(*inside, "ip", "link", "set", "cable", "up")
        port = self.ask("start")
        self.variables = {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{address}:{port}",
        }

    def ask(self, command: str) -> str:
        """Send a command and return the answer."""
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._read()

    def cut(self) -> None:
        """Disconnect the network: packets are lost."""
        run("ip", "link", "set", "store", "down")

    def connect(self) -> None:
        """Reconnect the network."""
        run("ip", "link", "set", "store", "up")

    def freeze(self) -> None:
        """Make the server accept connections without answering."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the server answer again."""
        self.process.send_signal(signal.SIGCONT)

    def owned(self) -> bool:
        """Whether a run has claimed the checkpoint root."""
        return self.snapshots.exists() and '"owned": true' in self.snapshots.read_text(encoding="utf-8")

    def watched(self, retained: int) -> RetentionWatch:
        """The observations of the checkpoints in the bucket."""
        watch = RetentionWatch(retained)
        for line in (
            self.snapshots.read_text(encoding="utf-8").splitlines() if self.snapshots.exists() else []
        ):
            record = json.loads(line)
            present = {int(step): CompleteCheckpoint(**facts) for step, facts in record["present"].items()}
            watch.observe(Snapshot(present, set(record["removing"]), set(record["aside"])))
        return watch

    def close(self) -> None:
        """Stop the server."""
        self.process.kill()
        self.process.wait()
        if self.cable:
            subprocess.run(["ip", "link", "delete", "store"], capture_output=True)

    def _read(self) -> str:
        assert self.process.stdout
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"the store has ended; see {self.snapshots.with_name('store.log')}")
        return answer


def available() -> bool:
    """Whether the server and its client are installed."""
    try:
        import moto.server  # noqa: F401
        import s3fs  # noqa: F401
    except ImportError:
        return False
    return True


def _objects() -> dict[str, bytes]:
    from moto.s3.models import s3_backends

    contents: dict[str, bytes] = {}
    for account in s3_backends.values():
        for backend in account.values():
            bucket = backend.buckets.get(BUCKET)
            if bucket:
                contents |= {name: key.value for name, key in list(bucket.keys.items())}
    return contents


def _snapshot() -> dict[str, Any]:
    objects, snapshot = _objects(), Snapshot()
    for name, content in objects.items():
        match = KEY.match(name)
        if match is None:
            continue
        state = objects.get(f"{name.rpartition('/')[0]}/state.json")
        checkpoint = complete_checkpoint(content, state)
        if match["aside"]:
            snapshot.aside.add(checkpoint.fingerprint)
        elif match["removing"]:
            snapshot.removing.add(checkpoint.fingerprint)
        else:
            snapshot.present[int(match["step"])] = checkpoint
    present = {str(step): asdict(checkpoint) for step, checkpoint in sorted(snapshot.present.items())}
    return {
        "present": present,
        "removing": sorted(snapshot.removing),
        "aside": sorted(snapshot.aside),
        "owned": f"{FOLDER}/OWNER.json" in objects,
    }


def _watch(path: Path) -> None:
    last = None
    while True:
        try:
            now = _snapshot()
        except (RuntimeError, KeyError, ValueError):  # it changed while it was read
            continue
        if now != last:
            last = now
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(now) + "\n")
        time.sleep(INTERVAL_SECONDS)


def main(address: str, snapshots: str) -> None:
    """Serve until standard input is closed."""
    from moto.server import ThreadedMotoServer

    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    server, port = None, 0
    print("ready", flush=True)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "start":
            server = ThreadedMotoServer(ip_address=address, port=port, verbose=False)
            server.start()
            if not port:
                port = server.get_host_and_port()[1]
                _make_bucket(f"http://{address}:{port}")
                threading.Thread(target=_watch, args=(Path(snapshots),), daemon=True).start()
        elif command == "stop" and server:
            server.stop()
        elif command == "dump":
            for name, content in _objects().items():
                target = Path(argument, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        print(port, flush=True)


def _make_bucket(endpoint: str) -> None:
    import boto3

    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket=BUCKET)


if __name__ == "__main__":
    main(*sys.argv[1:])
