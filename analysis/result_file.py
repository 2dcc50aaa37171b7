"""How the studies write what they found."""

import json
import os
import pathlib


def write(path, result):
    """JSON, whole or not at all under its name. NaN is refused."""
    partial = pathlib.Path(f"{path}.partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)
