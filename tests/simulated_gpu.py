"""A simulated GPU for tests: a device of PyTorch, written in Python, that needs no hardware.

Its tensors are computed on the CPU, but they are not the CPU's: an operation that mixes the two fails, as on
CUDA. So a run on it finds a tensor that was left on the wrong device: in training, in what is read from a
file, in the evaluation. A limit on the size of a tensor simulates a GPU whose memory is full.

It does not find what is CUDA's own: rounding, speed, how much memory is needed, operations that CUDA lacks.
"""

import itertools
import math
import os
import re
import signal
import sys
import types
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

SCRIPT = Path(__file__).resolve().parent.parent / "heft_finetuning.py"
# Operations that create a tensor (others call these), and those that take indices as second argument
CREATING = ["empty.memory_format", "empty_strided", "arange", "arange.start_step"]
INDEXING = ["index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"]


class SimulatedTensor(torch.Tensor):
    """A tensor of the simulated device. Its numbers are in `values`, a tensor of the CPU."""

    largest = math.inf  # bytes; a larger tensor does not fit into the memory

    @staticmethod
    def __new__(cls, values):
        if values.nbytes > cls.largest:
            raise torch.OutOfMemoryError(f"no memory for a tensor of {values.nbytes} bytes")
        layout = dict(dtype=values.dtype, strides=values.stride(), storage_offset=values.storage_offset())
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.shape, device="simulated:0", **layout)
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        """PyTorch calls this for each operation on tensors if one of them is of this class."""
        name, kwargs = operation._schema.name.removeprefix("aten::"), kwargs or {}
        # As on CUDA: a copy may mix devices, and scalars and the indices of a tensor may be on the CPU.
        one_device = [args[:1], args[2:]] if name in INDEXING else [args, kwargs]
        for x in [] if name in ("copy_", "_to_copy") else tree_leaves(one_device):
            if isinstance(x, torch.Tensor) and x.dim() and not isinstance(x, cls):
                raise RuntimeError(f"{name} mixes devices: a tensor of shape {tuple(x.shape)} is on the CPU")
        arguments = {}  # id of the values: tensor; an operation in place returns its argument

        def unwrap(x):
            if isinstance(x, cls):
                arguments[id(x.values)] = x
                return x.values
            return torch.device("cpu") if isinstance(x, torch.device) else x

        def wrap(x):
            return arguments[id(x)] if id(x) in arguments else cls(x)

        result = operation(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        to_cpu = kwargs.get("device") == torch.device("cpu")
        return result if to_cpu else tree_map_only(torch.Tensor, wrap, result)

    # What PyTorch reads without an operation
    def __format__(self, spec):
        return format(self.values, spec)

    def __reduce_ex__(self, protocol):  # torch.save
        about = self.values, self.dtype, str(self.device), self.requires_grad
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, about

    def tolist(self):
        return self.values.tolist()

    def untyped_storage(self):  # safetensors asks whether two tensors share their memory
        return self.values.untyped_storage()


def create(operation, *args, device=None, pin_memory=None, **options):
    """torch.empty(..., device="simulated") and the like."""
    return SimulatedTensor(operation(*args, device="cpu", **options))


def copy_from(source, target, non_blocking=False):
    """How torch.tensor(..., device="simulated") copies from the CPU."""
    target.values.copy_(source)
    return target


def load(torch_load, file, map_location=None, **options):
    """torch.load, which cannot move a storage to this device: the tensors are moved."""
    content = torch_load(file, map_location and "cpu", **options)
    return tree_map_only(torch.Tensor, lambda x: x.to(map_location), content) if map_location else content


def register():
    """Add the device to PyTorch in this process."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("simulated")
    for name in CREATING:
        operation = resolve_name(f"torch:ops.aten.{name if '.' in name else name + '.default'}")
        torch.library.impl(f"aten::{name}", "PrivateUse1", partial(create, operation))
    torch.library.impl("aten::_copy_from", "PrivateUse1", copy_from)
    torch.load = partial(load, torch.load)


def sigterm_after(function, calls):
    """Send SIGTERM to this process when the function with this name has been called so many times."""
    place, _, name = function.rpartition(".")
    owner, count = resolve_name(place), itertools.count(1)
    original = getattr(owner, name)

    def replacement(*args, **kwargs):
        result = original(*args, **kwargs)
        if next(count) == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    setattr(owner, name, replacement)


def run(folder, flags, text=None, device="simulated", largest=math.inf, stop=None):
    """Run the script in this process, in `folder`, where its output goes to the files out and err.

    text: the script's, if not that of its file. device: "simulated" or "cpu". largest: bytes of the largest
    tensor that fits into the simulated memory. stop: the arguments of sigterm_after."""
    os.chdir(folder)
    sys.stdout, sys.stderr = open("out", "w"), open("err", "w")
    torch.set_num_threads(1)  # threads do not survive a fork
    if device == "simulated":
        register()
        SimulatedTensor.largest = largest
    if stop:
        sigterm_after(*stop)
    text, found = re.subn(r"(?m)^DEVICE = .*", f'DEVICE = "{device}"', text or SCRIPT.read_text())
    assert found == 1, "the script should set DEVICE in one line"
    sys.argv = [str(SCRIPT), *flags]
    sys.modules["__main__"] = script = types.ModuleType("__main__")
    script.__file__ = str(SCRIPT)
    exec(compile(text, SCRIPT, "exec"), vars(script))
