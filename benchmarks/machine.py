"""What every result says of itself, where it is kept, and how it is printed."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


def describe(*packages: str) -> dict[str, Any]:
    """The machine, how busy it was with other things, the versions of these packages, and the date."""
    info = pathlib.Path("/proc/cpuinfo")
    names = {line.split(":", 1)[1].strip() for line in info.read_text(encoding="utf-8").splitlines()
             if line.startswith("model name")} if info.exists() else {platform.processor()}
    return {"date": datetime.date.today().isoformat(), "cpu": ", ".join(sorted(names)), "cores": os.cpu_count(),
            "load_before": round(os.getloadavg()[0], 2), "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages}}


def keep(result: Mapping[str, Any], path: str | pathlib.Path) -> None:
    """Writes a result to its file, and prints it as one line."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
