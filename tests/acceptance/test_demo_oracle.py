"""The demo finds in the shipped visibilities what is known of NGC 5921, on every runner.

The figures: 1445+099 has 2.488 Jy on the scale used here (the CASA Guide has 2.521 ± 0.002 Jy on a
newer one); the noise is 1.872 mJy/beam; the line peaks at 84.36 mJy/beam in channel 43, 45.1 sigma,
with a second horn of 42.7 sigma in channel 14 and about 18.5 sigma between them. The CASA manual
finds the peak of the (deconvolved) cube in the same channel, 90 arc seconds west and 90 north.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from penstock.demo import in_order, visibilities
from penstock.demo.imaging import FIELD, SIZE
from penstock.demo.report import Report
from penstock.demo.visibilities import Visibilities

DATA = Path(visibilities.__file__).parent / "data"
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def observation() -> Visibilities:
    return visibilities.read("reduced")


@pytest.fixture(scope="module")
def report(observation: Visibilities) -> Report:
    return in_order.reduce_in_order(observation)


# --------------------------------------------------------------------------------------- what is shipped


def test_every_row_channel_and_polarisation_is_shipped(observation: Visibilities) -> None:
    assert observation.data.shape == (22_653, 63, 2)
    assert observation.data.dtype == np.complex64
    rows = [int((observation.source == observation.index(name)).sum()) for name in ("1331", "1445", "N5921")]
    assert rows == [4_509, 5_292, 12_852]
    assert observation.frequency[[0, -1]] == pytest.approx([1.412665e9, 1.414179e9], abs=1e3)
    assert observation.antennas == 28
    assert len(np.unique(observation.scan)) == 7


def test_the_shipped_data_are_small_and_hold_visibilities_only() -> None:
    assert sorted(path.name for path in DATA.iterdir()) == ["PROVENANCE.md", visibilities.REDUCED]
    assert (DATA / visibilities.REDUCED).stat().st_size < 8 * MEBIBYTE
    assert visibilities.sha256(DATA / visibilities.REDUCED) in (DATA / "PROVENANCE.md").read_text()
    with np.load(DATA / visibilities.REDUCED) as archive:
        coordinates = {"uvw", "time", "antenna", "source", "weight", "frequency", "names", "direction"}
        assert set(archive.files) == {"low", "high", "step"} | coordinates


# ------------------------------------------------------------------------------------------ what is found


def test_the_flux_of_the_phase_calibrator(report: Report) -> None:
    assert report.calibrator_flux == pytest.approx(2.49, rel=0.01)
    assert report.calibrator_error < 0.005


def test_the_noise_and_the_peak(report: Report) -> None:
    assert report.rms == pytest.approx(1.87, rel=0.02)
    assert report.peak == pytest.approx(84.4, rel=0.01)
    assert report.peak_sigma == pytest.approx(45, abs=0.5)
    assert report.peak_channel == 43


def test_the_peak_lies_north_west_of_the_phase_centre(report: Report) -> None:
    north, west = (FIELD / SIZE * (place - SIZE // 2) for place in report.peak_pixel)
    assert (north, west) == (120, 105), "arc seconds"


def test_the_profile_has_two_horns(report: Report) -> None:
    sigma = dict(zip(report.channel.tolist(), report.spectrum / report.rms, strict=True))
    assert max(range(5, 29), key=sigma.__getitem__) == 14
    assert max(range(29, 51), key=sigma.__getitem__) == 43
    assert sigma[14] == pytest.approx(42.7, abs=0.5)
    assert sigma[43] == pytest.approx(45.1, abs=0.5)
    assert min(sigma[channel] for channel in range(15, 43)) == pytest.approx(18.5, abs=0.5)
    assert max(sigma[channel] for channel in (5, 6, 7, 8, 50)) < 5, "no line at the ends"
    assert np.ptp(report.velocity[[14 - 5, 43 - 5]]) == pytest.approx(149.5, abs=0.5)


@pytest.mark.parametrize(("size", "cell"), [(512, 15), (256, None)])
def test_larger_pixels_show_the_same_line(observation: Visibilities, size: int, cell: float | None) -> None:
    coarse = in_order.reduce_in_order(observation, size, cell)
    assert coarse.peak == pytest.approx(84.4, rel=0.01)
    assert coarse.peak_channel == 43
    assert coarse.rms == pytest.approx(1.87, rel=0.02)


# --------------------------------------------------------------------------- the answer comes from the data


def test_one_corrupted_channel_changes_its_plane_and_no_other(
    observation: Visibilities, report: Report
) -> None:
    spoilt = observation.data.copy()
    target = observation.source == observation.index("N5921")
    spoilt[target, 43] = 0
    changed = in_order.reduce_in_order(replace(observation, data=spoilt))
    differs = [one != other for one, other in zip(changed.digest, report.digest, strict=True)]
    assert report.channel[differs].tolist() == [43]
    assert changed.peak_channel == 14, "the other horn is now the brightest"
    assert changed.peak_sigma == pytest.approx(42.7, abs=0.5)


def test_a_corrupted_calibrator_changes_the_flux(observation: Visibilities, report: Report) -> None:
    spoilt = observation.data.copy()
    spoilt[observation.source == observation.index("1445"), 20] *= 2
    scale, _ = in_order.calibrate_in_order(replace(observation, data=spoilt))
    assert scale.flux == pytest.approx(report.calibrator_flux * 46 / 45, rel=1e-3)


# ------------------------------------------------------------------------------------- through the engine


@pytest.mark.parametrize(
    "runner",
    [
        pytest.param(name, marks=getattr(pytest.mark, name))
        for name in ("sequential", "threads", "processes", "dask", "ray")
    ],
)
def test_every_runner_makes_the_same_planes(
    runner: str, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.demo.flow import radio

    monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path / "home"))
    found = radio.with_options(task_runner=runner)(output=tmp_path / "made" / "ngc5921.png")
    assert found.digest == report.digest
    assert found.channel.tolist() == list(range(5, 51))
    assert found.calibrator_flux == pytest.approx(report.calibrator_flux, rel=1e-5)
    np.testing.assert_allclose(found.spectrum, report.spectrum, rtol=1e-5)
    assert found.picture == tmp_path / "made" / "ngc5921.png"
    assert found.picture.read_bytes().startswith(b"\x89PNG")
    assert str(found).splitlines()[0].endswith("2.492 ± 0.002 Jy")
