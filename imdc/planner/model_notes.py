"""What the reader of a plan has to know of the model itself."""

from __future__ import annotations

from imdc.model.shape import ModelShape
from imdc.units import format_tokens


def model_notes(shape: ModelShape) -> list[str]:
    """One line for each: layers with a window, parts that are not counted, weights whose size is an estimate."""
    notes = []
    if shape.sliding_layers:
        rest = shape.full_layers
        others = f"memory and schedule are about the other {rest}" if rest else "there is nothing to compress"
        layers, window = f"{shape.sliding_layers} of {shape.layers} layers", format_tokens(shape.window or 0)
        notes.append(f"note: {layers} see a window of {window} tokens; {others}")
    if shape.text_part_of is not None:
        notes.append("note: the text part alone; weights of other parts, such as a vision tower, come on top")
    if shape.weight_bits and shape.weight_bytes is None:
        bits = f"{shape.weight_bits} bits with their scales"
        notes.append(f"note: weights of {bits}, as the config says; an estimate")
    return notes
