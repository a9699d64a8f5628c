"""Commands of fm in one process, as `fm` itself runs them: a line of JSON words in, how it ended out."""

import contextlib
import io
import json
import sys

from fm_core.cli import main

for line in sys.stdin:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(json.loads(line))
    print(json.dumps({"code": code, "said": said.getvalue().splitlines()}), flush=True)
