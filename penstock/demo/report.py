"""What the demo found: the figures a radio astronomer would quote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penstock.demo.calibration import FluxScale
from penstock.demo.imaging import QUIET_CHANNEL, CubeSummary, velocity


@dataclass(frozen=True, eq=False)
class Report:
    """The measured figures of one reduction.

    Attributes
    ----------
    calibrator_flux : float, jansky
        Flux density of the phase calibrator 1445+099.
    calibrator_error : float, jansky
    rms : float, millijansky per beam
        Noise of the channel without line emission.
    peak : float, millijansky per beam
        Brightest pixel of the cube.
    peak_channel : int
    peak_pixel : tuple of int
        Where it is in its plane, as (y, x).
    peak_sigma : float
        `peak` over `rms`.
    channel : int64, shape (channel,)
    velocity : float64, shape (channel,), km/s
    spectrum : float64, shape (channel,), millijansky per beam
        Brightest pixel of each channel.
    digest : tuple of str
        SHA-256 of each plane: the same on every runner.
    picture : Path or None
        The PNG file.
    """

    calibrator_flux: float
    calibrator_error: float
    rms: float
    peak: float
    peak_channel: int
    peak_pixel: tuple[int, int]
    peak_sigma: float
    channel: NDArray[np.int64]
    velocity: NDArray[np.float64]
    spectrum: NDArray[np.float64]
    digest: tuple[str, ...]
    picture: Path | None = None

    def __str__(self) -> str:
        lines = [
            f"1445+099 (phase calibrator)  {self.calibrator_flux:8.3f} ± {self.calibrator_error:.3f} Jy",
            f"rms without line emission    {self.rms:8.3f} mJy/beam",
            f"peak of the HI line          {self.peak:8.2f} mJy/beam = {self.peak_sigma:.1f} sigma",
            f"in channel                   {self.peak_channel:8}",
        ]
        return "\n".join([*lines, f"picture                      {self.picture}"] if self.picture else lines)


def make_report(scale: FluxScale, cube: CubeSummary, picture: Path | None = None) -> Report:
    """Read the figures off a calibrated, imaged observation.

    Parameters
    ----------
    scale : FluxScale
    cube : CubeSummary
        Must include the channel without line emission.
    picture : Path, optional
    """
    rms = float(cube.rms[cube.channel == QUIET_CHANNEL][0])
    best = int(cube.peak.argmax())
    return Report(
        calibrator_flux=scale.flux,
        calibrator_error=scale.scatter,
        rms=1e3 * rms,
        peak=1e3 * float(cube.peak[best]),
        peak_channel=int(cube.channel[best]),
        peak_pixel=(int(cube.pixel[best, 0]), int(cube.pixel[best, 1])),
        peak_sigma=float(cube.peak[best]) / rms,
        channel=cube.channel,
        velocity=velocity(cube.frequency),
        spectrum=1e3 * cube.peak,
        digest=cube.digest,
        picture=picture,
    )
