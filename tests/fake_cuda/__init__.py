"""A CUDA device without a card: labels on the memory of the CPU, and torch's own rules about them.

`device.py` puts its parts together:

* `labels`: the memory that each storage claims to be in.
* `findings`: everything that would fail or wait on a card, with its place in the code.
* `names`: torch's names that make, move and read tensors.
* `oracle`: the mode in which torch's FakeTensor judges each operation.
* `streams`: streams and events, whose orders a checker of races gets.
* `kernels`: Triton's kernels, interpreted.

`layers` trains on it, and `faults.txt` has faults that it must report.

Values are true, so a run's losses are those of the CPU. Results of CUDA's kernels, NCCL and the
allocator are not seen.
"""
