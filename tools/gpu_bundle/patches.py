"""What is changed in the bundle's copies, and nowhere else: no import of what is left out, kernels
that were compiled beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Patch(NamedTuple):
    """`old` stands in `file` exactly once and becomes `new`; `why` is for the report."""

    file: str
    old: str
    new: str
    why: str


PATCHES = (
    Patch(
        "sglang/srt/layers/dual_gemm.py",
        "        if not is_cuda():\n            return None\n\n        from sglang.kernels",
        "        return None\n\n        from sglang.kernels",
        "a Llama's gate and up projections take the plain path: the fused one imports cutlass",
    ),
    Patch(
        "sglang/kernels/jit/utils/compile/loader.py",
        "    # Generated once and threaded through",
        '    beforehand = pathlib.Path(os.environ.get("SMG_BUNDLE_KERNELS", "/nowhere"))\n'
        '    if (library := beforehand / f"{spec.module_name}.so").is_file():\n'
        "        return _load(library)\n\n"
        "    # Generated once and threaded through",
        "SGLang's own kernels are taken from the bundle where it has them",
    ),
    Patch(
        "sglang/srt/layers/attention/flashinfer_backend.py",
        '        fmha_backend = "auto"\n',
        '        fmha_backend = "fa2"\n',
        "FlashInfer's ragged prefill takes the kernel that is in the bundle",
    ),
    Patch(
        "sglang/srt/layers/attention/flashinfer_mla_backend.py",
        '            self.fmha_backend = "auto"\n',
        '            self.fmha_backend = "fa2"\n',
        "the same for latents",
    ),
    Patch(
        "sglang/utils.py",
        "from IPython.display import HTML, display\n",
        "HTML = display = None\n",
        "IPython and what it needs is for notebooks",
    ),
)


def apply(site: Path) -> None:
    """Raises SystemExit where a file is not as it was when its patch was written."""
    for patch in PATCHES:
        path = site / patch.file
        text = path.read_text()
        if (found := text.count(patch.old)) != 1:
            raise SystemExit(f"{patch.file}: the text to patch is there {found} times, not once")
        path.write_text(text.replace(patch.old, patch.new))
