"""What the operations cost: predicted for GPUs that are not here, measured on the device that is.

`python -m kernels.bench --predict` prints the predictions, `python -m kernels.bench` measures, `--gpu-suite` does all
that a GPU is needed for. constants.py and model.py are the model and predict.py the operations in it; ops.py says what
is measured beside what, and measure.py how.
"""
