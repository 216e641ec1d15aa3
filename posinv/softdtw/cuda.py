"""Soft-DTW on NVIDIA GPUs: one launch for a batch's values, one more for its alignments.

The kernels are CUDA C++ (``kernel.cu``, which has a diagram) rather than Triton: the lanes of a
warp exchange values by shuffles, which Triton does not expose. NVRTC compiles them on first use, in
about a second; it and cuda-bindings come with PyTorch's own CUDA 13 packages.

Nothing here waits for the GPU or depends on the values of the lengths, so a CUDA graph can hold it.
The kernels check lengths on the GPU: where they don't fit the cost or the band, value and alignment
are NaN.

The first use on a device compares a small batch with the float64 reference (_self_check): it waits
for the GPU.

Costs have the columns that are stored of a band (:mod:`posinv.softdtw.band`). Two arrays of that
shape, ``up`` and ``left``, hold the softmin weights of every cell; ``up`` becomes the alignment. If
there is no room for both (:mod:`posinv.softdtw.memory`), ``left`` is a slab of some strips::

    cost, up        rows       1. forward, all strips: keeps only the accumulated cost of the row
    +-----------+                 above each strip (borders)
    | strip 0   |    0-31      2. for each slab, the last one first: forward again, from its
    | strip 1   |   32-63         borders, fills the weights of its strips; backward turns those in
    +-----------+                 up into the alignment
    | strip 2   |   64-95  <-- left: a slab of two strips, and a row that the slab below passes up
    | strip 3   |   96-127
    +-----------+
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posinv.errors import InputError
from posinv.lengths import on_device
from posinv.softdtw import reference
from posinv.softdtw.band import Band, make_band
from posinv.softdtw.memory import free_bytes, has_room

_STRIP = 32  # rows of a warp
_SHARED = 2 * 64 * _STRIP  # values of a strip in shared memory
_RANGES = 2 * 4 * _STRIP  # bytes beside them: the first and the last column of each row
_WORD = {torch.float32: torch.int32, torch.float64: torch.int64}
_EMPTY = -1  # the word that marks a value as not yet written


@cache
def _kernels(capability: tuple[int, int], dtype: torch.dtype) -> dict:
    """The kernels by name, for all devices of one compute capability."""
    try:
        from cuda.bindings import driver

        code = machine_code(capability, dtype)
    except (ImportError, RuntimeError) as error:
        raise InputError(
            'soft_dtw: backend "cuda" needs cuda-bindings and NVRTC, which come with PyTorch for'
            f' CUDA 13: install cuda-bindings and nvidia-cuda-nvrtc, or use "torch" ({error})'
        ) from error
    library = _succeeded(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
    return {
        name: driver.CUfunction(int(_succeeded(driver.cuLibraryGetKernel(library, name.encode()))))
        for name in ("forward", "backward")
    }


def machine_code(capability: tuple[int, int], dtype: torch.dtype) -> bytes:
    """Compile kernel.cu for one compute capability, for example (9, 0), and one dtype of the costs.

    Raises:
        RuntimeError: NVRTC does not compile it; its log is the message.
    """
    from cuda.bindings import nvrtc

    source = Path(__file__).with_name("kernel.cu").read_bytes()
    options = [b"--gpu-architecture=sm_%d%d" % capability]
    if dtype == torch.float64:
        options.append(b"-DDOUBLE")
    program = _succeeded(nvrtc.nvrtcCreateProgram(source, b"kernel.cu", 0, [], []))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status:
        log = b" " * _succeeded(nvrtc.nvrtcGetProgramLogSize(program))
        _succeeded(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{status!r}: {log.decode()}")
    code = b" " * _succeeded(nvrtc.nvrtcGetCUBINSize(program))
    _succeeded(nvrtc.nvrtcGetCUBIN(program, code))
    _succeeded(nvrtc.nvrtcDestroyProgram(program))
    return code


def _succeeded(results: tuple) -> Any:
    """Return what a function of cuda.bindings returned, without its status, which must be 0."""
    status, *rest = results
    if status:
        raise RuntimeError(repr(status))
    return rest[0] if rest else None


def _launch(name: str, blocks: int, args: tuple) -> None:
    """Start a kernel on the device of args[0], a tensor of the cost's type.

    The arguments are tensors, integers, floats, and None for no tensor.
    """
    from cuda.bindings import driver

    device = args[0].device
    kernel = _kernels(torch.cuda.get_device_capability(device), args[0].dtype)[name]
    shared = _SHARED * args[0].element_size() + _RANGES
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        _succeeded(
            driver.cuLaunchKernel(
                kernel, blocks, 1, 1, _STRIP, 1, 1, shared, stream, as_parameters(args), 0
            )
        )


def as_parameters(args: tuple) -> tuple[tuple, tuple]:
    """Return the values and the C types of a kernel's arguments.

    Tensors and None are pointers, integers have 64 bits, and floats are doubles.
    """
    types = {int: ctypes.c_longlong, float: ctypes.c_double}
    return (
        tuple(arg.data_ptr() if isinstance(arg, Tensor) else arg or 0 for arg in args),
        tuple(types.get(type(arg), ctypes.c_void_p) for arg in args),
    )


def align(
    cost: Tensor, band: Band, gamma: float, with_alignment: bool
) -> tuple[Tensor, Tensor | None]:
    """Back end of :mod:`posinv.softdtw.functional`; a band on the GPU need not be checked."""
    if cost.numel() == 0:
        return cost.new_empty(len(cost)), torch.empty_like(cost) if with_alignment else None
    if not (cost.is_cuda and torch.cuda.is_current_stream_capturing()):
        _self_check(cost.device, cost.dtype)
    return _align(cost, band, gamma, with_alignment)


@cache
def _self_check(device: torch.device, dtype: torch.dtype) -> None:
    """Compare a small batch with the float64 reference: once in a process, if it is right.

    Its pairs have one or two strips, and one or two chunks of columns.

    Raises:
        InputError: the kernels are wrong on this device.
    """
    x_lengths, y_lengths = torch.tensor([[40, 7], [2, 70], [33, 3], [1, 1]]).T
    cost = torch.rand(4, 40, 70, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    band = make_band(x_lengths, y_lengths, 40, 70, None, "slanted", True)
    value, gradient = reference.align(cost, band, 0.1, True)
    there = cost.to(device, dtype)
    found, found_gradient = _align(there, band, 0.1, True)
    alone, _ = _align(there, band, 0.1, False)
    for name, ours, right in (
        ("value", found, value),
        ("gradient", found_gradient, gradient),
        ("value without gradient", alone, value),
    ):
        assert ours is not None and right is not None
        error = (ours.double().cpu() - right).abs().max().item()
        if not error <= 1e-3:  # NaN, too
            card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            raise InputError(
                f'soft_dtw: backend "cuda" is wrong on {device} ({card}): the {name} of a test'
                f" batch in {str(dtype).removeprefix('torch.')} is off by {error:.1e}; use"
                ' backend="torch", and report it with the output of tools/check_install.py'
            )


def _align(
    cost: Tensor, band: Band, gamma: float, with_alignment: bool
) -> tuple[Tensor, Tensor | None]:
    batch = _Batch(cost.contiguous(), band, gamma)
    if not with_alignment:
        batch.forward(batch.borders())
        return batch.value, None
    alignment = batch.alignment() if has_room(cost) else batch.alignment_in_slabs()
    return batch.value, alignment


class _Batch:
    """The kernel launches for one batch. Strip s is the rows from 32 s to 32 s + 31."""

    def __init__(self, cost: Tensor, band: Band, gamma: float) -> None:
        B, N, width = cost.shape
        self.cost = cost
        self.gamma = float(gamma)
        self.strips = -(-N // _STRIP)
        self.value = cost.new_empty(B)
        device = cost.device
        self.sizes = (
            *(B, N, band.M, width),
            on_device(band.x_lengths, N, device).contiguous(),
            on_device(band.y_lengths, band.M, device).contiguous(),
            band.lines.to(device, non_blocking=True).contiguous(),
            band.first.to(device, non_blocking=True).contiguous(),
        )

    def borders(self) -> tuple[Tensor, Tensor, int, int]:
        """Two arrays for the rows above strips, and how many rows an utterance and a strip have."""
        B, _, width = self.cost.shape
        halves = _mark_empty(self.cost.new_empty(2, B, self.strips, width))
        return *halves, self.strips, 1

    def forward(
        self,
        borders: tuple[Tensor, Tensor, int, int],
        weights: tuple[Tensor | None, Tensor | None, int] = (None, None, 0),
        first: int = 0,
        stop: int | None = None,
    ) -> None:
        """Fill the values, the borders and the weights (up, left, left's rows) of some strips."""
        strips = (self.strips if stop is None else stop) - first
        start = (self.cost, *self.sizes, self.gamma, _counter(self.cost), first)
        _launch("forward", len(self.cost) * strips, (*start, *borders, *weights, self.value))

    def backward(self, weights: tuple[Tensor, Tensor, int], first: int, stop: int) -> None:
        """Replace the up weights of some strips by the alignment."""
        args = (self.value, *self.sizes, _counter(self.cost), first, stop - first, *weights)
        _launch("backward", len(self.cost) * (stop - first), args)

    def alignment(self) -> Tensor:
        """All strips at once. A strip's first row of weights replaces its border."""
        up, left = torch.empty_like(self.cost), torch.empty_like(self.cost)
        _mark_empty(up[:, _STRIP::_STRIP])
        _mark_empty(left[:, _STRIP::_STRIP])
        rows = self.cost.shape[1]
        self.forward((up, left, rows, _STRIP), (up, left, rows))
        self.backward((up, left, rows), 0, self.strips)
        return up

    def alignment_in_slabs(self) -> Tensor:
        """Slab by slab, each of as many strips as there is memory for."""
        B, _, width = self.cost.shape
        borders = self.borders()
        self.forward(borders)
        up = torch.empty_like(self.cost)
        rows = free_bytes(up.device) // (B * width * up.element_size())
        size = min(max((rows - 1) // _STRIP, 1), self.strips)
        # One row more, for what the slab below passes up.
        left = up.new_empty(B, size * _STRIP + 1, width)
        weights = (up, left, left.shape[1])
        for stop in range(self.strips, 0, -size):
            first = max(0, stop - size)
            rows = (stop - first) * _STRIP
            left[:, rows] = left[:, 0]
            _mark_empty(left[:, :rows:_STRIP])
            self.forward(borders, weights, first, stop)
            self.backward(weights, first, stop)
        return up


def _mark_empty(values: Tensor) -> Tensor:
    values.view(_WORD[values.dtype]).fill_(_EMPTY)
    return values


def _counter(cost: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int32, device=cost.device)
