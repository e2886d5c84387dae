"""From calibrated visibilities to planes on the sky, and from planes to the cube's figures.

A plane is an array ``[y, x]``: x grows to the west and y to the north, as in a
FITS image, and the phase centre is pixel ``[size // 2, size // 2]``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from penstock.demo.visibilities import SPEED_OF_LIGHT, Visibilities

CHANNELS: Final = range(5, 51)
"""The channels that are imaged: the line and a little on either side."""

SIZE: Final = 512
"""Pixels along each side of a plane."""

FIELD: Final = 3840.0
"""Arc seconds along each side of a plane, twice the telescope's field of view: pixels of 7.5, six to a beam."""

QUIET_CHANNEL: Final = 8
"""A channel without line emission, whose rms is the noise of the cube."""

REST_FREQUENCY: Final = 1_420_405_752.0
"""Hertz, of the HI line."""

ARCSEC: Final = np.pi / 180 / 3600
"""Radians."""

SOURCE_RADIUS: Final = 600.0
"""Arc seconds from the phase centre within which the galaxy is looked for."""

CLIP: Final = 4.0
"""Pixels fainter than this many standard deviations do not enter the moment map."""

EPSILON: Final = 1e-4
"""Accuracy of the gridding, relative to the sum of the amplitudes."""


@dataclass(frozen=True, eq=False)
class Plane:
    """The sky in one channel, not deconvolved.

    Attributes
    ----------
    channel : int
    frequency : float, hertz
    width : float, hertz
    cell : float, arc seconds
    image : float32, shape (y, x), jansky per beam
    """

    channel: int
    frequency: float
    width: float
    cell: float
    image: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class CubeSummary:
    """What is known of the planes seen so far; summaries of two sets of planes can be merged.

    Attributes
    ----------
    channel : int64, shape (channel,)
        In ascending order, as are the other arrays.
    frequency : float64, shape (channel,), hertz
    peak : float64, shape (channel,), jansky per beam
        Brightest pixel within `SOURCE_RADIUS` of the phase centre: the spectrum.
    pixel : int64, shape (channel, 2)
        Where it is, as (y, x).
    rms : float64, shape (channel,), jansky per beam
        Standard deviation over the whole plane.
    digest : tuple of str
        SHA-256 of each plane: equal planes have equal digests.
    moment0 : float32, shape (y, x), jansky per beam times km/s
        Sum over the channels, of pixels above `CLIP` times the noise.
    cell : float, arc seconds
    """

    channel: NDArray[np.int64]
    frequency: NDArray[np.float64]
    peak: NDArray[np.float64]
    pixel: NDArray[np.int64]
    rms: NDArray[np.float64]
    digest: tuple[str, ...]
    moment0: NDArray[np.float32]
    cell: float


def image_channel(line: Visibilities, channel: int, size: int, cell: float) -> Plane:
    """Image one channel, both polarisations together, with natural weights.

    Parameters
    ----------
    line : Visibilities
        Calibrated, one source, jansky.
    channel : int
        Zero-based.
    size : int
        Pixels along each side of the plane, even.
    cell : float
        Arc seconds along each side of a pixel.

    Raises
    ------
    ValueError
        If the size is odd or below 32, or the plane would be wider than 60 degrees.
    """
    import ducc0

    if size % 2 or size < 32 or not 0 < size * cell <= 60 * 3600:
        raise ValueError(f"a plane of {size} pixels of {cell} arc seconds is odd, too small or too wide")
    stokes_i = line.data[:, channel : channel + 1].mean(axis=2)
    weight = line.weight / line.weight.sum(dtype=np.float64)
    u, v, w = line.uvw.T
    image = ducc0.wgridder.vis2dirty(
        uvw=np.stack([-v, u, w], axis=1),  # with the signs of UVFITS, u points west and v south
        freq=line.frequency[channel : channel + 1].copy(),
        vis=stokes_i,
        wgt=weight[:, np.newaxis].astype(np.float32),
        npix_x=size,
        npix_y=size,
        pixsize_x=cell * ARCSEC,
        pixsize_y=cell * ARCSEC,
        epsilon=EPSILON,
        do_wgridding=True,
        nthreads=1,  # one thread: the same bits on every runner
    )
    frequency, width = float(line.frequency[channel]), float(line.frequency[1] - line.frequency[0])
    return Plane(channel=channel, frequency=frequency, width=width, cell=cell, image=image)


def summarise(plane: Plane) -> CubeSummary:
    """Measure one plane."""
    image = plane.image
    size = image.shape[0]
    reach = min(size // 2, max(1, round(SOURCE_RADIUS / plane.cell)))
    corner = size // 2 - reach
    inner = image[corner : corner + 2 * reach, corner : corner + 2 * reach]
    y, x = np.unravel_index(int(inner.argmax()), inner.shape)
    depth = plane.width / REST_FREQUENCY * SPEED_OF_LIGHT / 1000  # km/s
    noise = 1.4826 * float(np.median(np.abs(image - np.median(image))))
    return CubeSummary(
        channel=np.array([plane.channel]),
        frequency=np.array([plane.frequency]),
        peak=np.array([inner[y, x]], np.float64),
        pixel=np.array([[y + corner, x + corner]]),
        rms=np.array([image.std(dtype=np.float64)]),
        digest=(hashlib.sha256(np.ascontiguousarray(image).data).hexdigest(),),
        moment0=np.where(image > CLIP * noise, image * np.float32(depth), np.float32(0)),
        cell=plane.cell,
    )


def merge_cubes(parts: Sequence[CubeSummary]) -> CubeSummary:
    """Merge summaries of different channels; the order of `parts` only moves the last bits of the sum."""
    order = np.argsort(np.concatenate([part.channel for part in parts]))
    digest = [one for part in parts for one in part.digest]
    moment0 = parts[0].moment0.copy()
    for part in parts[1:]:
        moment0 += part.moment0

    def joined(name: str) -> NDArray[Any]:
        together: NDArray[Any] = np.concatenate([getattr(part, name) for part in parts])[order]
        return together

    return CubeSummary(
        channel=joined("channel"),
        frequency=joined("frequency"),
        peak=joined("peak"),
        pixel=joined("pixel"),
        rms=joined("rms"),
        digest=tuple(digest[place] for place in order),
        moment0=moment0,
        cell=parts[0].cell,
    )


def velocity(frequency: NDArray[np.float64]) -> NDArray[np.float64]:
    """Radial velocity of the HI line in km/s (radio convention, in the frame of the frequencies)."""
    return (1 - frequency / REST_FREQUENCY) * SPEED_OF_LIGHT / 1000
