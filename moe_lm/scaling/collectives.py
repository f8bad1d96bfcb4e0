"""Seconds of a collective: latency and bandwidth, over a node's fast links, its island's network and the weak links.

Ring algorithms (Thakur et al. 2005): n ranks pass 1 / n of the data around n - 1 times for a gather or a scatter of
reductions, twice that for an all-reduce. Ranks that several kinds of links join go one level after the other: between
islands each moves what is its own among the ranks of its island, between nodes what is its own in its node.
"""

from moe_lm.scaling.hardware import Machine


def levels(machine: Machine, ranks: int, stride: int) -> list[tuple[int, float, float]]:
    """The ring at each level, fastest first: its ranks, its bytes/s from each rank, its seconds per message.

    `stride` is the distance between neighbours in the numbering of GPUs: with tp = 8, neighbours in data parallelism
    are 8 apart, so that each is in a node of its own. A last node or island that is only partly filled counts as one.
    """
    sheet, reached = machine.sheet, machine.reached
    inside = max(1, min(ranks, sheet.gpus_per_node // stride))
    nodes = -(-ranks // inside)
    neighbours = nodes
    if sheet.island_gpus:
        neighbours = max(1, min(nodes, sheet.island_gpus // (inside * stride)))
    islands = -(-nodes // neighbours)
    return [
        (inside, sheet.nvlink * reached.links, sheet.nvlink_latency),
        (neighbours, sheet.network * reached.network, sheet.network_latency),
        (islands, sheet.weak_network * reached.network, sheet.network_latency),
    ]


def all_gather(machine: Machine, nbytes: float, ranks: int, stride: int = 1) -> float:
    """Seconds until each of `ranks`, `stride` apart, has all `nbytes`, of which each began with 1 / ranks."""
    seconds = 0.0
    part = nbytes
    for size, rate, latency in levels(machine, ranks, stride):
        if size > 1:
            seconds += (size - 1) * (latency + part / size / rate)
        part /= size
    return seconds


def reduce_scatter(machine: Machine, nbytes: float, ranks: int, stride: int = 1) -> float:
    """Seconds until each of `ranks` has its 1 / ranks of the sum over ranks of `nbytes`."""
    return all_gather(machine, nbytes, ranks, stride)


def all_reduce(machine: Machine, nbytes: float, ranks: int, stride: int = 1) -> float:
    """Seconds until each of `ranks` has the sum of all their `nbytes`."""
    return reduce_scatter(machine, nbytes, ranks, stride) + all_gather(machine, nbytes, ranks, stride)


def all_to_all(machine: Machine, nbytes: float, ranks: int, stride: int = 1) -> float:
    """Seconds until each of `ranks` has sent 1 / ranks of its `nbytes` to each of the others.

    The levels have links of their own and work at once: the slowest sets the time.
    """
    slowest, near = 0.0, 1
    for size, rate, latency in levels(machine, ranks, stride):
        far = min(ranks, near * size)
        if size > 1:
            slowest = max(slowest, latency + nbytes * (far - near) / ranks / rate)
        near = far
    return slowest


def send(machine: Machine, nbytes: float, stride: int = 1) -> float:
    """Seconds of one message to the rank `stride` away."""
    sheet, reached = machine.sheet, machine.reached
    if stride < sheet.gpus_per_node:
        return sheet.nvlink_latency + nbytes / (sheet.nvlink * reached.links)
    weak = sheet.island_gpus and stride >= sheet.island_gpus
    rate = sheet.weak_network if weak else sheet.network
    return sheet.network_latency + nbytes / (rate * reached.network)
