"""What torch.nn's attention asks of expand: the batch in dim 0, and no fast path around the modules."""

from torch import nn

from ..nn import MemberLinear
from ..nn.routing import Routed

_TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)


def check_batch_first(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Raise if a replacement would run beside attention with batch_first=False: dim 0 is the sequence there.

    Looked at are torch.nn's transformer classes, and modules that hold an nn.MultiheadAttention themselves.

    Raises:
        NotImplementedError: the message names both modules.
    """
    for name, module in model.named_modules():
        known = isinstance(module, _TRANSFORMERS)
        near = module.modules() if known else module.children()
        if not any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in near):
            continue
        for child_name, child in module.named_modules(prefix=name):
            new = replacements.get(child)
            # A head beside attention usually has taken a token of the sequence, and so rows of the batch.
            if new is not None and (known or not isinstance(new, MemberLinear)):
                raise NotImplementedError(
                    f"expand: {child_name} is in {name or 'the model'} ({type(module).__name__}), whose attention has "
                    "batch_first=False: dim 0 is not the batch there; make it with batch_first=True"
                )


def _keep_modules(layer: nn.Module, args: tuple) -> None:
    """A forward pre-hook that does nothing: with one, nn.TransformerEncoderLayer calls its modules.

    Its fast path in eval mode would read their weights instead, [K, …] or without gains.
    """


def close_fast_paths(model: nn.Module) -> None:
    """Make encoder layers of an expanded model call its modules."""
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and any(isinstance(m, Routed) for m in layer.modules()):
            layer.register_forward_pre_hook(_keep_modules)


def open_fast_paths(model: nn.Module) -> None:
    """Undo close_fast_paths."""
    for layer in model.modules():
        for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _keep_modules]:
            del layer._forward_pre_hooks[key]
