"""The real data of the demo: files that ship inside installed packages."""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

INSTALL = "pip install 'everpool[demo]'"


class MissingPackageError(Exception):
    """A package that carries the demo's data is not installed."""


@dataclass(frozen=True)
class Volume:
    """An MRI volume as it lies in its file: the numbers, and where they are in the head."""

    name: str
    what: str
    voxels: "np.ndarray[Any, Any]"
    affine: "np.ndarray[Any, Any]"


def _file_of(package: str, relative: str) -> Path:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / relative
        if path.exists():
            return path
    raise MissingPackageError(f"The demo's data come from the package {package}.")


def read_volumes() -> list[Volume]:
    """Read the volumes from their compressed files, afresh each time."""
    t1 = _file_of("nilearn", "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")
    scan = _file_of("nibabel", "tests/data/example4d.nii.gz")
    return [
        _read_volume("scans/t1", "T1 template of the brain", t1),
        _read_volume("scans/4d", "4-D scan", scan),
    ]


def _read_volume(name: str, what: str, path: Path) -> Volume:
    nibabel: Any = importlib.import_module("nibabel")
    image = nibabel.load(path)
    return Volume(name, what, image.dataobj.get_unscaled(), image.affine)


def read_table() -> Any:
    """Read the table of airports of the United States as an Arrow table."""
    try:
        csv: Any = importlib.import_module("pyarrow.csv")
    except ImportError:
        raise MissingPackageError("The demo's table needs the package pyarrow.") from None

    return csv.read_csv(_file_of("vega_datasets", "_data/airports.csv"))
