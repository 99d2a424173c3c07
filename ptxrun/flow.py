"""The order in which control flows through a kernel, which says which of a warp's parted threads are behind.

The text of a kernel does not say it: a compiler may put the place where two ways meet before one of them.
"""
from collections.abc import Iterable


def flow_order(ways: dict[int, list[int]], start: int = 0) -> dict[int, int]:
    """Number the nodes of a control-flow graph: `ways` from each node to the next.

    A node comes behind all from which control reaches it, those of its own loop apart, and a loop as a whole before
    what follows it (F. Bourdoncle, Efficient chaotic iteration strategies with widenings, 1993: a weak topological
    order). So where the threads that come first run first, those that took different ways meet where the ways do.
    """
    order = _ordered(ways, set(ways), [start, *sorted(ways)])
    return {node: number for number, node in enumerate(order)}


def _ordered(ways: dict[int, list[int]], nodes: set[int], starts: Iterable[int]) -> list[int]:
    """The nodes in order; of a loop, its head and then what is left without the ways back to it."""
    order = []
    for head, *others in _loops(ways, nodes, starts):
        order.append(head)
        if others:
            order += _ordered(ways, set(others), [node for node in ways[head] if node in others])
    return order


def _loops(ways: dict[int, list[int]], nodes: set[int], starts: Iterable[int]) -> list[list[int]]:
    """The strongly connected components of a part of the graph, in topological order, each with its head first.

    R. Tarjan's algorithm, without recursion.
    """
    number, lowest, open_nodes, found = {}, {}, [], []

    def enter(node):
        number[node] = lowest[node] = len(number)
        open_nodes.append(node)
        path.append((node, iter(ways[node])))

    for start in starts:
        path = []
        if start not in number:
            enter(start)
        while path:
            node, rest = path[-1]
            following = next((one for one in rest if one in nodes), None)
            if following is None:
                path.pop()
                if path:
                    lowest[path[-1][0]] = min(lowest[path[-1][0]], lowest[node])
                if lowest[node] == number[node]:
                    at = open_nodes.index(node)
                    found.append(open_nodes[at:])
                    del open_nodes[at:]
            elif following not in number:
                enter(following)
            elif following in open_nodes:
                lowest[node] = min(lowest[node], number[following])
    return found[::-1]
