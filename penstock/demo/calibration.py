"""Turn correlator units into jansky, and leave only the spectral line.

The model behind every function: the correlation of antennas p and q is
``gain[p] * conj(gain[q]) * bandpass[p] * conj(bandpass[q]) * sky``, for each
polarisation on its own, and a calibrator is one point at the phase centre.
Sums are element by element, never by BLAS, so that the same bits come out
whatever number of threads a process may use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from penstock.demo.visibilities import Visibilities

FLUX_STANDARD: Final = "1331+305"
FLUX_STANDARD_JY: Final = 14.8
"""3C 286 at 1.41 GHz, taken as constant over the 1.5 MHz of the band."""

PHASE_CALIBRATOR: Final = "1445+099"
TARGET: Final = "N5921"

FLAT: Final = slice(6, 51)
"""Channels 6 to 50, where the bandpass is flat: they are averaged for the gains."""

LINE_FREE: Final = (*range(4, 7), *range(50, 60))
"""Channels on both sides of the line: the continuum is fitted to them."""

_STEPS: Final = 200
_CONVERGED: Final = 1e-10


@dataclass(frozen=True, eq=False)
class Gains:
    """Antenna gains, one row for each scan of a calibrator.

    Attributes
    ----------
    value : complex128, shape (scan, polarisation, antenna), square root of correlator units per jansky
        Before `bootstrap_flux`, a calibrator counts as 1 Jy. 0 = antenna absent.
    time : float64, shape (scan,), seconds
    source : int32, shape (scan,)
    """

    value: NDArray[np.complex128]
    time: NDArray[np.float64]
    source: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class FluxScale:
    """Gains that give jansky, and the flux density found for the phase calibrator.

    Attributes
    ----------
    gains : Gains
    flux : float, jansky
    scatter : float, jansky
        Standard error of `flux` over antennas, scans and polarisations.
    """

    gains: Gains
    flux: float
    scatter: float


@dataclass(frozen=True, eq=False)
class Bandpass:
    """What one channel adds to the gains.

    Attributes
    ----------
    channel : int
    value : complex128, shape (polarisation, antenna)
        Near 1 in the middle of the band; 0 = antenna absent.
    """

    channel: int
    value: NDArray[np.complex128]


def calibrator_scans(observation: Visibilities) -> list[int]:
    """List the scans on the flux standard and on the phase calibrator, in order of time."""
    wanted = [observation.index(FLUX_STANDARD), observation.index(PHASE_CALIBRATOR)]
    return [int(scan) for scan in np.unique(observation.scan[np.isin(observation.source, wanted)])]


def solve_antennas(product: NDArray[np.complex128], weight: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Find gains whose products fit a matrix of baselines, by alternating least squares.

    Each step solves for one factor with the other held (StefCal; Salvini &
    Wijnholds 2014); every second step is averaged with the one before.

    Parameters
    ----------
    product : complex128, shape (antenna, antenna)
        Weighted sum of the correlations of p with q, Hermitian, diagonal 0.
    weight : float64, shape (antenna, antenna)
        Sum of the weights; 0 where the baseline has no data.

    Returns
    -------
    complex128, shape (antenna,)
        Phases are relative to the first antenna present; 0 = antenna absent.

    Raises
    ------
    ArithmeticError
        If the steps do not converge, or a correlation is not a finite number.
    """
    if not np.isfinite(product).all():
        raise ArithmeticError("antenna gains need finite correlations: flag the others by weight 0")
    present = weight.sum(axis=1) > 0
    first, total = int(np.argmax(present)), weight.sum()
    level = np.sqrt(np.abs(product).sum() / total) if total else 0.0
    phase = np.angle(product[:, first])
    phase[first] = 0
    gain: NDArray[np.complex128] = level * present * np.exp(1j * phase)
    for step in range(_STEPS):
        power = (weight * np.abs(gain) ** 2).sum(axis=1)
        fresh = np.zeros_like(gain)
        np.divide((product * gain).sum(axis=1), power, out=fresh, where=power > 0)
        if step % 2:
            fresh = (fresh + gain) / 2
        change, gain = np.abs(fresh - gain).max(), fresh
        if change <= _CONVERGED * np.abs(gain).max():
            gain *= np.exp(-1j * np.angle(gain[first]))
            return gain
    raise ArithmeticError(f"antenna gains did not converge in {_STEPS} steps")


def solve_gains(observation: Visibilities, scan: int) -> Gains:
    """Solve the antenna gains of one calibrator scan, each polarisation on its own.

    Parameters
    ----------
    observation : Visibilities
        The whole measurement; only the rows of `scan` are read.
    scan : int

    Returns
    -------
    Gains
        One scan; the calibrator counts as 1 Jy.
    """
    part = observation.select(observation.baselines(scan=scan))
    if not part.time.size:
        raise ValueError(f"scan {scan} holds no unflagged baseline")
    mean = part.data[:, FLAT].mean(axis=1, dtype=np.complex128)
    return Gains(
        value=_solve_each(part, mean, observation.antennas)[np.newaxis],
        time=np.array([part.time.mean()]),
        source=part.source[:1].copy(),
    )


def merge_gains(parts: Sequence[Gains]) -> Gains:
    """Put the scans of several solutions into one, in order of time."""
    time = np.concatenate([part.time for part in parts])
    order = np.argsort(time)
    return Gains(
        value=np.concatenate([part.value for part in parts])[order],
        time=time[order],
        source=np.concatenate([part.source for part in parts])[order],
    )


def bootstrap_flux(gains: Gains, observation: Visibilities) -> FluxScale:
    """Carry the flux of the standard over to the phase calibrator, and scale its gains.

    An antenna's sensitivity is the same on both sources, so the ratio of the
    squared gains is the ratio of the flux densities.

    Parameters
    ----------
    gains : Gains
        All calibrator scans, solved as if each source had 1 Jy.
    observation : Visibilities
        Only its list of sources is read.

    Returns
    -------
    FluxScale
        Its gains are those of the phase calibrator alone.
    """
    standard = gains.source == observation.index(FLUX_STANDARD)
    phase = gains.source == observation.index(PHASE_CALIBRATOR)
    known = (np.abs(gains.value[standard]) ** 2).mean(axis=0) / FLUX_STANDARD_JY
    found = np.abs(gains.value[phase]) ** 2
    ratio = (found / np.where(known > 0, known, np.inf))[(found > 0) & (known > 0)]
    flux = float(ratio.mean())
    return FluxScale(
        gains=Gains(gains.value[phase] / np.sqrt(flux), gains.time[phase], gains.source[phase]),
        flux=flux,
        scatter=float(ratio.std() / np.sqrt(ratio.size)),
    )


def solve_bandpass(observation: Visibilities, gains: Gains, channel: int) -> Bandpass:
    """Solve what one channel adds to the gains of the band, on the flux standard.

    Parameters
    ----------
    observation : Visibilities
        The whole measurement; only one channel of the flux standard is read.
    gains : Gains
        Of all calibrator scans, as `solve_gains` gives them.
    channel : int
        Zero-based.
    """
    standard = observation.index(FLUX_STANDARD)
    part = observation.select(observation.baselines(source=standard))
    band = gains.value[gains.source == standard].mean(axis=0)
    here = _solve_each(part, part.data[:, channel], observation.antennas)
    return Bandpass(channel=channel, value=np.divide(here, band, out=np.zeros_like(here), where=band != 0))


def apply_calibration(
    observation: Visibilities, scale: FluxScale, bandpass: Sequence[Bandpass]
) -> Visibilities:
    """Divide the target's visibilities by what the instrument did to them.

    Gains are interpolated linearly in amplitude and phase between the scans of
    the phase calibrator, and held before the first and after the last.

    Parameters
    ----------
    observation : Visibilities
    scale : FluxScale
    bandpass : sequence of Bandpass
        One for each channel, in any order.

    Returns
    -------
    Visibilities
        Baselines of the target alone, in jansky. Rows without a gain are dropped.
    """
    ordered = sorted(bandpass, key=lambda part: part.channel)
    if [part.channel for part in ordered] != list(range(observation.frequency.size)):
        raise ValueError("the bandpass must have each channel of the observation exactly once")
    part = observation.select(observation.baselines(source=observation.index(TARGET)))
    moment, row_moment = np.unique(part.time, return_inverse=True)
    gain = _interpolate(scale.gains, moment)[row_moment]  # [row, polarisation, antenna]
    row = np.arange(row_moment.size)
    band = np.stack([one.value for one in ordered])  # [channel, polarisation, antenna]
    p, q = part.antenna1, part.antenna2
    factor = gain[row, :, p] * np.conj(gain[row, :, q])  # [row, polarisation]
    shape = np.ascontiguousarray((band[:, :, p] * np.conj(band[:, :, q])).transpose(2, 0, 1))
    shape *= factor[:, np.newaxis]
    data = np.zeros_like(shape)
    np.divide(part.data, shape, out=data, where=shape != 0)
    kept = (factor != 0).all(axis=1)
    return replace(part, data=data.astype(np.complex64)).select(kept)


def subtract_continuum(line: Visibilities, channels: Sequence[int] = LINE_FREE) -> Visibilities:
    """Fit a straight line to the line-free channels of each row and take it off all channels.

    Parameters
    ----------
    line : Visibilities
        Calibrated.
    channels : sequence of int
        Zero-based channels without line emission.

    Returns
    -------
    Visibilities
        The same rows and channels.
    """
    count = line.frequency.size
    place = np.linspace(-1, 1, count)
    fit = place[list(channels)]
    spread = fit - fit.mean()
    sample = line.data[:, list(channels)].astype(np.complex128)
    level = sample.mean(axis=1)
    slope = (sample * spread[:, np.newaxis]).sum(axis=1) / (spread**2).sum()
    continuum = level[:, np.newaxis] + slope[:, np.newaxis] * (place - fit.mean())[:, np.newaxis]
    return replace(line, data=(line.data - continuum).astype(np.complex64))


def _solve_each(part: Visibilities, value: NDArray[Any], size: int) -> NDArray[np.complex128]:
    """Add rows up by baseline and solve each polarisation.

    Parameters
    ----------
    part : Visibilities
    value : complex, shape (row, polarisation)
    size : int
        Length of the antenna axis.

    Returns
    -------
    complex128, shape (polarisation, antenna)
    """
    cell = part.antenna1.astype(np.int64) * size + part.antenna2

    def total(weights: NDArray[Any]) -> NDArray[np.float64]:
        sums = np.bincount(cell, weights, minlength=size * size).astype(np.float64, copy=False)
        return sums.reshape(size, size)

    weight = total(part.weight)
    solved = []
    for one in value.T:
        product = total(part.weight * one.real) + 1j * total(part.weight * one.imag)
        solved.append(solve_antennas(product + product.conj().T, weight + weight.T))
    return np.stack(solved)


def _interpolate(gains: Gains, moment: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Gains at given times, shape (time, polarisation, antenna)."""
    after = np.clip(np.searchsorted(gains.time, moment), 1, max(gains.time.size - 1, 1))
    before = after - 1
    after = np.minimum(after, gains.time.size - 1)
    span = np.where(after > before, gains.time[after] - gains.time[before], 1)
    share = np.clip((moment - gains.time[before]) / span, 0, 1)[:, np.newaxis, np.newaxis]
    amplitude, phase = np.abs(gains.value), np.unwrap(np.angle(gains.value), axis=0)
    mixed = amplitude[before] * (1 - share) + amplitude[after] * share
    turned = phase[before] * (1 - share) + phase[after] * share
    gain: NDArray[np.complex128] = mixed * np.exp(1j * turned)
    return gain
