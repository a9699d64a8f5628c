"""fm commands run one after another in one process: a JSON list of arguments per line in, the result out."""

import contextlib
import io
import json
import sys

from fm_core.cli import main

if __name__ == "__main__":
    for line in sys.stdin:
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            code = main(json.loads(line))
        print(json.dumps({"code": code, "output": output.getvalue().splitlines()}), flush=True)
