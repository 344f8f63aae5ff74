"""A GPU that pretends: its tensors lie in the CPU's memory, but it minds what a GPU minds, and counts what it holds.

An operation on tensors of both devices is refused, as CUDA refuses it. The numbers are those of the CPU.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
BETWEEN = {
    aten._to_copy.default,
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
}


class Module:
    """What PyTorch asks of the module of a device."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


_setup_privateuseone_for_python_backend("pretend", backend_module=Module())
GPU = torch.device("pretend:0")


class Memory:
    """Bytes of all tensors that live on the device, and the most that did; workspaces of kernels are not among them."""

    now = peak = 0
    _storages: set[int] = set()

    @classmethod
    def hold(cls, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if size and key not in cls._storages:
            cls._storages.add(key)
            cls.now += size
            cls.peak = max(cls.peak, cls.now)
            weakref.finalize(storage, cls.release, key, size)

    @classmethod
    def release(cls, key: int, size: int) -> None:
        cls._storages.discard(key)
        cls.now -= size


class OnGPU(Tensor):
    """A tensor on the device; ``raw`` is the CPU tensor behind it."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor):
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, raw.shape, **layout, dtype=raw.dtype, device=GPU)

    def __init__(self, raw: Tensor):
        self.raw = raw
        Memory.hold(raw.untyped_storage())

    def __repr__(self) -> str:
        return f"OnGPU({self.raw})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


def run(operation: Any, args: tuple, kwargs: dict) -> Any:
    """One operation, with the CPU tensors behind those on the device."""
    leaves, form = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    there = {id(tensor.raw): tensor for tensor in tensors if isinstance(tensor, OnGPU)}
    here = [tensor for tensor in tensors if not isinstance(tensor, OnGPU) and tensor.dim()]
    if there and here and operation not in BETWEEN:
        found = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"{operation}: expected all tensors on one device, found {found}")
    if there and operation is aten._fused_sdp_choice.default:
        return 0  # attention of plain matrix products: what else there is differs from device to device
    wanted = kwargs.get("device")
    goes = torch.device(wanted).type == GPU.type if wanted is not None else bool(there)
    args, kwargs = pytree.tree_unflatten([leaf.raw if isinstance(leaf, OnGPU) else leaf for leaf in leaves], form)
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    result = operation(*args, **kwargs)
    if wanted is not None and operation is aten._to_copy.default:
        result = result.clone()  # a CPU tensor "moved to the CPU" may be the same one
    if operation is aten.copy_.default and id(args[0]) not in there:
        return result  # filled from the device, but here
    if not goes:
        return result
    return pytree.tree_map_only(Tensor, lambda raw: there[id(raw)] if id(raw) in there else OnGPU(raw), result)


class Pretend(TorchDispatchMode):
    """``with Pretend(): …``, and ``device=GPU`` works."""

    def __enter__(self):
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=GPU) makes a CPU tensor, then moves it
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self.before)
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd"):
            with self:  # without gradients these arrive whole
                return operation.decompose(*args, **kwargs)
        return run(operation, args, kwargs)
