"""The ground of the house: weight formats, an expert's tensors, the strips they are packed in."""
