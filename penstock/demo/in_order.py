"""The same reduction as one plain function, step after step: what every runner is compared with."""

from __future__ import annotations

from penstock.demo import calibration, imaging
from penstock.demo.report import Report, make_report
from penstock.demo.visibilities import Visibilities


def calibrate_in_order(observation: Visibilities) -> tuple[calibration.FluxScale, Visibilities]:
    """Calibrate without an engine: the flux scale, and the target's line in jansky."""
    scans = calibration.calibrator_scans(observation)
    gains = calibration.merge_gains([calibration.solve_gains(observation, scan) for scan in scans])
    scale = calibration.bootstrap_flux(gains, observation)
    channels = range(observation.frequency.size)
    bandpass = [calibration.solve_bandpass(observation, gains, channel) for channel in channels]
    target = calibration.apply_calibration(observation, scale, bandpass)
    return scale, calibration.subtract_continuum(target)


def image_in_order(line: Visibilities, size: int, cell: float) -> imaging.CubeSummary:
    """Image every channel without an engine, and merge what is measured."""
    planes = (imaging.image_channel(line, channel, size, cell) for channel in imaging.CHANNELS)
    return imaging.merge_cubes([imaging.summarise(plane) for plane in planes])


def reduce_in_order(observation: Visibilities, size: int = imaging.SIZE, cell: float | None = None) -> Report:
    """Reduce an observation without an engine.

    Parameters
    ----------
    observation : Visibilities
    size : int
        Pixels along each side of a plane.
    cell : float, optional
        Arc seconds along each side of a pixel; by default the plane covers `imaging.FIELD`.
    """
    scale, line = calibrate_in_order(observation)
    return make_report(scale, image_in_order(line, size, cell or imaging.FIELD / size))
