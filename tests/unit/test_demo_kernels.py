"""The demo's kernels on skies and instruments we made ourselves: what went in must come out."""

import importlib.util
import io
import pickle
import pickletools
import shutil
import subprocess
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.demo import calibration, imaging, picture, visibilities
from penstock.demo.calibration import Bandpass, FluxScale, Gains
from penstock.demo.imaging import ARCSEC
from penstock.demo.report import make_report
from penstock.demo.visibilities import SPEED_OF_LIGHT, Visibilities

ANTENNAS = 9
ABSENT = 4
CHANNELS = 63
PHASE_FLUX = 2.5
SOURCES = ("1331+30500002_0", "1445+09900002_0", "N5921_2")


def frozen(observation: Visibilities) -> Visibilities:
    """What the engine hands to a task: nobody can write into it."""
    for field in fields(observation):
        value = getattr(observation, field.name)
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    return observation


class Telescope:
    """An array with known gains, looking at two calibrators and at one point beside the phase centre."""

    def __init__(self, seed: int = 5921) -> None:
        random = np.random.default_rng(seed)
        self.position = random.uniform(-500, 500, (ANTENNAS, 3)) * (1, 1, 0.1)
        self.gain = random.uniform(0.5, 2, (2, ANTENNAS)) * np.exp(1j * random.uniform(-3, 3, (2, ANTENNAS)))
        slope = random.uniform(-0.2, 0.2, (2, ANTENNAS))
        turn = random.uniform(-0.5, 0.5, (2, ANTENNAS))
        band = np.linspace(-1, 1, CHANNELS)[:, None, None]
        self.band = (1 + slope * band) * np.exp(1j * turn * band)
        self.frequency = 1.4127e9 + 24_414.0625 * np.arange(CHANNELS)

    def true_sky(
        self, uvw: NDArray[np.float64], east: float, north: float, flux: float
    ) -> NDArray[np.complex128]:
        """Visibilities [row, channel] of a point, offsets in arc seconds, with the signs of UVFITS."""
        x, y = east * ARCSEC, north * ARCSEC
        path = uvw @ np.array([x, y, np.sqrt(1 - x * x - y * y) - 1])
        return flux * np.exp(2j * np.pi * path[:, None] * self.frequency / SPEED_OF_LIGHT)

    def observe(self, east: float = 0.0, north: float = 0.0, flux: float = 0.1) -> Visibilities:
        """Scans on standard, phase calibrator, target, phase calibrator: three integrations each."""
        order = (0, 1, 2, 1)
        pair = [(p, q) for p in range(ANTENNAS) for q in range(p, ANTENNAS) if ABSENT not in (p, q)]
        p, q = (np.array(side * 3 * len(order)) for side in zip(*pair, strict=True))
        step = np.repeat(np.arange(3 * len(order)), len(pair))
        source = np.array(order)[step // 3]
        uvw = (self.position[p] - self.position[q]) * (1, 1, 1 + 0.01 * step[:, None])[2]
        sky = np.where(source == 0, calibration.FLUX_STANDARD_JY, PHASE_FLUX)[:, None] + np.zeros(CHANNELS)
        sky = np.where((source == 2)[:, None], self.true_sky(uvw, east, north, flux), sky)
        each = self.gain[:, p] * np.conj(self.gain[:, q])
        shape = each[None] * self.band[:, :, p] * np.conj(self.band[:, :, q])
        return Visibilities(
            uvw=uvw,
            time=(4.3e9 + 30.0 * step).astype(np.float64),
            antenna1=p.astype(np.int32),
            antenna2=q.astype(np.int32),
            scan=(step // 3).astype(np.int32),
            source=source.astype(np.int32),
            data=np.ascontiguousarray(sky[:, :, None] * shape.transpose(2, 0, 1)).astype(np.complex64),
            weight=np.full(step.size, 6, np.float32),
            frequency=self.frequency.astype(np.float64),
            sources=SOURCES,
            direction=np.zeros((3, 2)),
        )


@pytest.fixture(scope="module")
def telescope() -> Telescope:
    return Telescope()


def solve(observation: Visibilities) -> tuple[Gains, FluxScale, list[Bandpass]]:
    scans = calibration.calibrator_scans(observation)
    gains = calibration.merge_gains([calibration.solve_gains(observation, scan) for scan in reversed(scans)])
    bandpass = [calibration.solve_bandpass(observation, gains, channel) for channel in range(CHANNELS)]
    return gains, calibration.bootstrap_flux(gains, observation), bandpass


# ------------------------------------------------------------------------------------------- calibration


def test_known_gains_are_recovered_up_to_the_phase_of_the_first_antenna() -> None:
    random = np.random.default_rng(1)
    truth = random.uniform(0.2, 3, 12) * np.exp(1j * random.uniform(-3, 3, 12))
    truth[7] = 0
    weight = np.outer(truth != 0, truth != 0) * (1.0 - np.eye(12)) * 6
    found = calibration.solve_antennas((weight * np.outer(truth, truth.conj())).astype(np.complex128), weight)
    assert found[7] == 0
    np.testing.assert_allclose(found, truth * np.exp(-1j * np.angle(truth[0])), rtol=1e-8)


def test_no_data_give_no_gain_and_nonsense_is_refused() -> None:
    nothing = np.zeros((4, 4))
    assert not calibration.solve_antennas(nothing.astype(np.complex128), nothing).any()
    with pytest.raises(ArithmeticError, match="need finite correlations"):
        calibration.solve_antennas(np.full((4, 4), np.nan, np.complex128), np.ones((4, 4)))


def test_gains_that_do_not_settle_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_STEPS", 2)
    random = np.random.default_rng(2).normal(size=(5, 5)) + 0j
    with pytest.raises(ArithmeticError, match="did not converge in 2 steps"):
        calibration.solve_antennas(random + random.conj().T, np.ones((5, 5)) - np.eye(5))


def test_opposite_phases_are_found() -> None:
    weight = np.ones((2, 2)) - np.eye(2)
    found = calibration.solve_antennas((-4 * weight).astype(np.complex128), weight)
    np.testing.assert_allclose(found, np.array([2, -2]), rtol=1e-9)


def test_a_scan_without_baselines_is_named() -> None:
    observation = Telescope().observe()
    with pytest.raises(ValueError, match="scan 99 holds no unflagged baseline"):
        calibration.solve_gains(observation, 99)


def test_the_flux_of_the_phase_calibrator_is_found_from_the_standard(telescope: Telescope) -> None:
    observation = telescope.observe()
    gains, scale, _ = solve(observation)
    assert calibration.calibrator_scans(observation) == [0, 1, 3]
    assert gains.source.tolist() == [0, 1, 1]
    assert scale.flux == pytest.approx(PHASE_FLUX, rel=1e-6)
    assert scale.scatter < 1e-6
    assert scale.gains.value.shape == (2, 2, ANTENNAS)
    assert (scale.gains.value[..., ABSENT] == 0).all()


def test_calibration_gives_back_the_sky_that_was_observed(telescope: Telescope) -> None:
    observation = telescope.observe(east=-90, north=60)
    _, scale, bandpass = solve(observation)
    line = calibration.apply_calibration(observation, scale, bandpass[::-1])
    truth = telescope.true_sky(line.uvw, -90, 60, 0.1)
    assert (line.source == 2).all()
    assert (line.antenna1 != line.antenna2).all()
    np.testing.assert_allclose(line.data, np.stack([truth, truth], axis=2), atol=2e-6)


def test_gains_between_two_scans_are_interpolated(telescope: Telescope) -> None:
    observation = telescope.observe()
    _, scale, bandpass = solve(observation)
    doubled = replace(scale.gains, value=scale.gains.value * np.array([1, 2])[:, None, None])
    middle = scale.gains.time.mean()
    held = replace(observation, time=np.where(observation.source == 2, middle, observation.time))
    once = calibration.apply_calibration(held, scale, bandpass)
    again = calibration.apply_calibration(held, replace(scale, gains=doubled), bandpass)
    np.testing.assert_allclose(again.data * 1.5**2, once.data, rtol=1e-5)


def test_a_missing_channel_of_the_bandpass_is_an_error(telescope: Telescope) -> None:
    observation = telescope.observe()
    _, scale, bandpass = solve(observation)
    with pytest.raises(ValueError, match="each channel of the observation exactly once"):
        calibration.apply_calibration(observation, scale, bandpass[1:])


def test_flagged_rows_do_not_count(telescope: Telescope) -> None:
    observation = telescope.observe()
    bad = (observation.scan == 1) & (observation.antenna1 == 0) & (observation.antenna2 == 3)
    spoilt = replace(
        observation,
        data=np.where(bad[:, None, None], np.complex64(1e6), observation.data),
        weight=np.where(bad, np.float32(0), observation.weight),
    )
    assert solve(spoilt)[1].flux == pytest.approx(PHASE_FLUX, rel=1e-3)


def test_a_continuum_is_taken_off_and_the_line_stays(telescope: Telescope) -> None:
    observation = telescope.observe()
    ramp = np.linspace(3, 5, CHANNELS) * (1 + 2j)
    emission = np.exp(-(((np.arange(CHANNELS) - 28) / 4) ** 2))
    rows = observation.data.shape[0]
    data = np.broadcast_to((ramp + emission)[None, :, None], (rows, CHANNELS, 2)).astype(np.complex64)
    left = calibration.subtract_continuum(replace(observation, data=data)).data
    np.testing.assert_allclose(left, np.broadcast_to(emission[None, :, None], left.shape), atol=2e-6)


# ----------------------------------------------------------------------------------------------- imaging


@pytest.mark.parametrize("east,north", [(0, 0), (-150, 90), (90, -300)])
def test_a_point_is_imaged_where_it_is_and_as_bright_as_it_is(
    telescope: Telescope, east: float, north: float
) -> None:
    observation = telescope.observe()
    truth = telescope.true_sky(observation.uvw, east, north, 0.25)
    sky = replace(observation, data=np.stack([truth, truth], axis=2).astype(np.complex64))
    line = sky.select(sky.baselines())
    plane = imaging.image_channel(line, 40, 256, 15)
    y, x = np.unravel_index(plane.image.argmax(), plane.image.shape)
    assert (int(y) - 128) * 15 == north, "north is up"
    assert (int(x) - 128) * 15 == -east, "east is to the left"
    assert plane.image.max() == pytest.approx(0.25, rel=2e-4)
    assert plane.image.dtype == np.float32
    assert plane.image.flags.c_contiguous
    assert plane.frequency == observation.frequency[40]


def test_the_same_input_gives_the_same_bits(telescope: Telescope) -> None:
    line = telescope.observe()
    line = line.select(line.baselines(source=2))
    one, other = (imaging.summarise(imaging.image_channel(line, 7, 64, 15)) for _ in range(2))
    assert one.digest == other.digest
    assert one.digest != imaging.summarise(imaging.image_channel(line, 8, 64, 15)).digest


@pytest.mark.parametrize("size,cell", [(511, 15), (16, 15), (512, 0), (512, 1000)])
def test_an_impossible_plane_is_refused(telescope: Telescope, size: int, cell: float) -> None:
    with pytest.raises(ValueError, match="odd, too small or too wide"):
        imaging.image_channel(telescope.observe(), 7, size, cell)


def plane(channel: int, peak: float) -> imaging.Plane:
    image = np.random.default_rng(channel).normal(0, 1e-3, (64, 64)).astype(np.float32)
    image[30, 40] = peak
    image[0, 0] = 9
    return imaging.Plane(channel=channel, frequency=1.4e9 + channel, width=24_414.0625, cell=60, image=image)


def test_a_plane_is_measured_near_the_phase_centre_only() -> None:
    summary = imaging.summarise(plane(3, 0.08))
    assert summary.peak[0] == np.float32(0.08)
    assert summary.pixel.tolist() == [[30, 40]]
    depth = 24_414.0625 / imaging.REST_FREQUENCY * SPEED_OF_LIGHT / 1000
    assert summary.moment0[30, 40] == pytest.approx(0.08 * depth)
    assert (summary.moment0 == 0).mean() > 0.99, "noise stays out of the map"


def test_summaries_merge_to_the_same_cube_in_any_order() -> None:
    parts = [imaging.summarise(plane(channel, 0.01 * channel)) for channel in range(1, 8)]
    straight = imaging.merge_cubes(parts)
    tree = imaging.merge_cubes([imaging.merge_cubes(parts[4:]), imaging.merge_cubes(parts[3::-1])])
    assert straight.channel.tolist() == tree.channel.tolist() == list(range(1, 8))
    assert straight.digest == tree.digest
    assert (straight.peak == tree.peak).all()
    assert (straight.pixel == tree.pixel).all()
    np.testing.assert_allclose(tree.moment0, straight.moment0, rtol=1e-5)


def test_velocity_is_zero_at_rest_and_grows_with_redshift() -> None:
    still, away = imaging.velocity(np.array([imaging.REST_FREQUENCY, 1.4134e9]))
    assert still == 0
    assert away == pytest.approx(1478.6, abs=0.1)


# ------------------------------------------------------------------------- what the engine may do to inputs


def test_no_kernel_writes_into_what_it_is_given(telescope: Telescope) -> None:
    observation = frozen(telescope.observe(east=30))
    before = observation.data.copy()
    _, scale, bandpass = solve(observation)
    scale.gains.value.flags.writeable = False
    for one in bandpass:
        one.value.flags.writeable = False
    line = frozen(calibration.subtract_continuum(calibration.apply_calibration(observation, scale, bandpass)))
    planes = [imaging.image_channel(line, channel, 64, 15) for channel in (7, 8)]
    for image in planes:
        image.image.flags.writeable = False
    parts = [imaging.summarise(image) for image in planes]
    for part in parts:
        part.moment0.flags.writeable = False
    imaging.merge_cubes(parts)
    np.testing.assert_array_equal(before, observation.data)


def test_visibilities_travel_outside_the_pickle_and_need_only_numpy(telescope: Telescope) -> None:
    observation = telescope.observe()
    _, scale, bandpass = solve(observation)
    for sent in (observation, calibration.apply_calibration(observation, scale, bandpass)):
        buffers: list[pickle.PickleBuffer] = []
        packed = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
        assert len(packed) < 4096
        assert sum(memoryview(buffer).nbytes for buffer in buffers) >= sent.nbytes
        words = {word for _, word, _ in pickletools.genops(packed) if isinstance(word, str)}
        rooms = {word.split(".")[0] for word in words if "." in word and not word[0].isdigit()}
        assert rooms <= {"numpy", "penstock"}
        received = pickle.loads(packed, buffers=buffers)
        np.testing.assert_array_equal(received.data, sent.data)
        assert received.sources == sent.sources


# ------------------------------------------------------------------------------------------------ reading


def write_uvfits(path: Path, observation: Visibilities) -> None:
    from astropy.io import fits

    rows, channels, pols = observation.data.shape
    cube = np.ones((rows, 1, 1, 1, channels, pols, 3), np.float32)
    cube[:, 0, 0, 0, :, :, 0], cube[:, 0, 0, 0, :, :, 1] = observation.data.real, observation.data.imag
    cube[0, 0, 0, 0, 5, 0, 2] = -1
    day = observation.time / 86_400 + 2_400_000.5
    names = ["UU", "VV", "WW", "DATE", "DATE", "BASELINE", "SOURCE"]
    baseline = (observation.antenna1 + 1) * 256 + observation.antenna2 + 1
    values = [*(observation.uvw.T / SPEED_OF_LIGHT), np.floor(day), day % 1, baseline, observation.source + 1]
    groups = fits.GroupData(cube, parnames=names, pardata=values, bitpix=-32)
    primary = fits.GroupsHDU(groups)
    for axis, (kind, value, step, place) in enumerate(
        [("COMPLEX", 1, 1, 1), ("STOKES", -1, -1, 1), ("FREQ", observation.frequency[31], 24_414.0625, 32)], 2
    ):
        primary.header[f"CTYPE{axis}"], primary.header[f"CRVAL{axis}"] = kind, value
        primary.header[f"CDELT{axis}"], primary.header[f"CRPIX{axis}"] = step, place
    table = fits.BinTableHDU.from_columns(
        [
            fits.Column("SOURCE", "20A", array=np.array(observation.sources)),
            fits.Column("RAEPO", "1D", array=[-157.2, -138.7, -129.5]),
            fits.Column("DECEPO", "1D", array=[30.5, 10.0, 5.1]),
        ],
        name="AIPS SU",
    )
    fits.HDUList([primary, table]).writeto(path)


def test_a_uvfits_file_is_read_as_it_was_written(tmp_path: Path, telescope: Telescope) -> None:
    written = telescope.observe(east=20)
    write_uvfits(tmp_path / "small.fits", written)
    found = visibilities.read(tmp_path / "small.fits")
    np.testing.assert_array_equal(found.data, written.data)
    np.testing.assert_allclose(found.uvw, written.uvw, rtol=1e-6)
    np.testing.assert_allclose(found.frequency, written.frequency, rtol=1e-12)
    np.testing.assert_allclose(found.direction[:, 0], [202.8, 221.3, 230.5])
    assert (found.antenna1 == written.antenna1).all()
    assert (found.antenna2 == written.antenna2).all()
    assert (found.scan == written.scan).all()
    assert found.sources == SOURCES
    assert found.antennas == ANTENNAS
    assert found.weight[0] == 0, "one flagged channel flags its row"
    assert (found.weight[1:] == 1).all()
    assert all(getattr(found, name).flags.c_contiguous for name in ("uvw", "data", "time", "weight"))


def test_what_is_no_visibility_file_is_named(tmp_path: Path) -> None:
    from astropy.io import fits

    with pytest.raises(FileNotFoundError, match="there is no visibility file at"):
        visibilities.read(tmp_path / "missing.fits")
    fits.PrimaryHDU(np.zeros((4, 4), np.float32)).writeto(tmp_path / "other.fits")
    with pytest.raises(ValueError, match="is not a UVFITS file of one band: its axes are"):
        visibilities.read(tmp_path / "other.fits")


def test_an_unknown_source_is_named(telescope: Telescope) -> None:
    with pytest.raises(ValueError, match="no source is called '3C48'"):
        telescope.observe().index("3C48")


# ----------------------------------------------------------------------------------------------- fetching


def wheel(content: bytes, member: str = visibilities.FULL_MEMBER) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(member, content)
    return packed.getvalue()


class Pip:
    """Stands for pip: leaves a wheel in the folder it is told, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, content: bytes | None, stderr: str = "") -> None:
        self.calls: list[list[str]] = []
        self.content, self.stderr = content, stderr
        monkeypatch.setattr(subprocess, "run", self.run)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)

    def run(self, command: list[str], **options: Any) -> SimpleNamespace:
        self.calls.append(command)
        if self.content is not None:
            (Path(command[command.index("--dest") + 1]) / "casadata-1.whl").write_bytes(self.content)
        return SimpleNamespace(returncode=int(self.content is None), stderr=self.stderr)


def test_the_full_file_is_fetched_once_and_verified(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pip = Pip(monkeypatch, wheel(b"the visibilities"))
    with pytest.raises(
        RuntimeError, match=r"NGC5921\.fits from casadata-1\.whl has sha256 [0-9a-f]{64}, not"
    ):
        visibilities.fetch_full(tmp_path)
    assert list(tmp_path.iterdir()) == [], "neither the wheel nor a wrong file is left behind"

    (tmp_path / "right").write_bytes(b"the visibilities")
    monkeypatch.setattr(visibilities, "FULL_SHA256", visibilities.sha256(tmp_path / "right"))
    kept = visibilities.fetch_full(tmp_path / "cache")
    assert kept.read_bytes() == b"the visibilities"
    assert [path.name for path in kept.parent.iterdir()] == [visibilities.FULL]
    assert visibilities.fetch_full(tmp_path / "cache") == kept
    assert len(pip.calls) == 2
    assert pip.calls[0][1:4] == ["-m", "pip", "download"]
    assert "casadata==2025.9.22" in pip.calls[0]


def test_a_failed_download_says_what_pip_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Pip(monkeypatch, None, "WARNING: x\nERROR: No matching distribution found")
    with pytest.raises(RuntimeError, match=r"could not download casadata==2025\.9\.22: ERROR: No matching"):
        visibilities.fetch_full(tmp_path)


@pytest.mark.parametrize("content", [b"no zip at all", wheel(b"x", "another/file")])
def test_a_wheel_without_the_file_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    Pip(monkeypatch, content)
    with pytest.raises(RuntimeError, match=r"casadata-1\.whl does not hold casadata/"):
        visibilities.fetch_full(tmp_path)


def test_without_pip_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="needs pip: run `python -m ensurepip` first"):
        visibilities.fetch_full(tmp_path)


# ------------------------------------------------------------------------------------------------ picture


def test_the_picture_shows_any_cube(tmp_path: Path) -> None:
    parts = [imaging.summarise(plane(channel, 0.02)) for channel in range(5, 12)]
    cube = imaging.merge_cubes(parts)
    nothing = FluxScale(
        Gains(np.zeros((1, 2, 3), np.complex128), np.zeros(1), np.zeros(1, np.int32)), 2.5, 0.1
    )
    plain = make_report(nothing, cube)
    assert plain.picture is None
    assert "picture" not in str(plain)
    drawn = picture.draw(plain, cube, tmp_path / "deep" / "one.png")
    assert drawn.picture == tmp_path / "deep" / "one.png"
    assert drawn.picture.read_bytes().startswith(b"\x89PNG")
    assert str(drawn).endswith("one.png")
    empty = replace(cube, moment0=np.zeros_like(cube.moment0), peak=np.zeros_like(cube.peak))
    assert picture.draw(make_report(nothing, empty), empty, tmp_path / "empty.png").peak == 0
