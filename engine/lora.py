"""Low-rank adapters beside the linear layers of a model, by PEFT.

PEFT makes the adapters, names their weights and defines their files. Only the forward pass of a
layer is ours. Import this module only where adapters are used: PEFT is an optional package, and its
import takes seconds.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import torch
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.refusals import damaged

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from engine.llama import Llama
    from run.method import Adapter

NAME = "default"  # PEFT's name of an adapter that was given none
PREFIX = "base_model.model."  # of a weight's name in PEFT's files
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# All linear layers but the head, as in QLoRA (arXiv:2305.14314, section 4).
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AdaptedLinear(PeftLinear):
    """A frozen linear layer with an adapter: ``base(x) + scaling * up(down(dropout(x)))``.

    PEFT's own forward pass multiplies and adds in separate passes over the large output. Here the
    small one is multiplied, and the product with ``up`` adds to the base's output.
    """

    @property
    def down(self) -> nn.Linear:
        """``[rank, in_features]``; PEFT's ``lora_A``."""
        return self.lora_A[NAME]

    @property
    def up(self) -> nn.Linear:
        """``[out_features, rank]``; PEFT's ``lora_B``."""
        return self.lora_B[NAME]

    @property
    def scale(self) -> float:
        return self.scaling[NAME]

    def forward(self, hidden: Tensor) -> Tensor:
        low = self.down(self.lora_dropout[NAME](hidden)) * self.scale
        states = self.base_layer(hidden)
        if states.dim() != 2:  # in Transformers' own forward pass
            return states + self.up(low)
        return states.addmm_(low, self.up.weight.T)


class Adapters:
    """The adapters of a model, as a checkpoint contains them."""

    def __init__(self, pretrained: "LlamaForCausalLM", adapter: "Adapter"):
        self._pretrained, self.adapter = pretrained, adapter

    @property
    def layers(self) -> list[AdaptedLinear]:
        return [layer for layer in self._pretrained.modules() if isinstance(layer, AdaptedLinear)]

    @property
    def kept_numbers(self) -> int:
        """How many numbers all of them keep of a token for the backward pass."""
        return sum(
            layer.r[NAME] + (2 * layer.in_features if self.adapter.dropout else 0)
            for layer in self.layers
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Their weights, by PEFT's names."""
        return {
            PREFIX + name.replace(f".{NAME}.", "."): weight.detach()
            for name, weight in self._pretrained.named_parameters()
            if weight.requires_grad
        }

    def save_pretrained(
        self,
        folder: Path,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | None = None,
    ) -> None:
        """Write them as PEFT does.

        Args:
            state_dict: copies of their weights; None: the weights themselves.
            max_shard_size: not used, since PEFT reads a single file.
        """
        weights = self.state_dict() if state_dict is None else dict(state_dict)
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config = peft_config(self.adapter)
        config.inference_mode = True
        config.save_pretrained(str(folder))
        # PEFT writes the names of the layers in another order each time.
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        content["target_modules"] = sorted(content["target_modules"])
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def peft_config(adapter: "Adapter") -> peft.LoraConfig:
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=adapter.base,
        target_modules=list(TARGETS),
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.is_rank_stabilised,
    )


def add_adapters(model: "Llama", adapter: "Adapter") -> None:
    """Add adapters to ``model``, and freeze its own weights.

    The adapters have the model's dtype. PEFT would make them float32 in a bfloat16 model, and then
    convert each layer's input to float32 and multiply that. In bfloat16, Kahan summation keeps what
    rounding takes from their updates, as it does for full fine-tuning (see `build_optimizer`).

    Raises:
        UserError: the weights of trained adapters can't be read.
    """
    model.stored = adapters = inject(model.pretrained, adapter, model.dtype)
    model.kernels.replace_linear_layers(model.pretrained)
    if adapter.folder is not None:
        _load(adapters, adapter.folder)


def inject(pretrained: "LlamaForCausalLM", adapter: "Adapter", dtype: torch.dtype) -> Adapters:
    """Put new adapters of ``dtype`` beside the linear layers of ``pretrained``; freeze the rest."""
    config = peft_config(adapter)
    config._register_custom_module({nn.Linear: AdaptedLinear})
    # On the CPU, so that the same seed gives the same weights on every device. Its generator alone
    # is seeded: a GPU's would draw other dropout in the run that gathers its adapters to decode.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(adapter.seed)
        peft.inject_adapter_in_model(config, pretrained)
    for layer in (adapters := Adapters(pretrained, adapter)).layers:
        for linear in (layer.down, layer.up):
            linear.to(dtype)  # a base in 4 bits has no dtype that PEFT could have taken
    return adapters


@torch.no_grad()
def _load(adapters: Adapters, folder: Path) -> None:
    try:
        saved, weights = load_file(folder / WEIGHTS_FILE), adapters.state_dict()
        if differences := sorted(saved.keys() ^ weights.keys()):
            raise ValueError(f"{differences[0]} is not in both of the file and the model")
        for name, weight in weights.items():
            weight.copy_(saved[name])
    except Exception as error:  # safetensors and torch raise many types
        raise damaged(folder, WEIGHTS_FILE, error) from None


@torch.no_grad()
def merge_adapters(model: "Llama", dtype: torch.dtype) -> "LlamaForCausalLM":
    """Add each adapter to the weight of its layer, computed in float32 and rounded once.

    A base in 4 bits is dequantised first.

    Returns:
        `Llama.pretrained` as an ordinary model in ``dtype``. ``model`` can't be used any more.
    """
    for parent in list(model.pretrained.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, AdaptedLinear):
                setattr(parent, name, _merged(layer, dtype))
    return model.pretrained


def _merged(layer: AdaptedLinear, dtype: torch.dtype) -> nn.Linear:
    base = layer.base_layer
    weight = base.weight
    if hasattr(weight, "quant_state"):
        from engine.nf4 import dequantised

        weight = dequantised(weight)
    total = weight.float().addmm(
        layer.up.weight.float(), layer.down.weight.float(), alpha=layer.scale
    )
    with torch.device("meta"):
        merged = nn.Linear(layer.in_features, layer.out_features, bias=base.bias is not None)
    merged.weight = nn.Parameter(total.to(dtype))
    if base.bias is not None:
        merged.bias = base.bias
    return merged
