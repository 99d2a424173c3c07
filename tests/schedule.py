"""When a compiled loop asks for what it multiplies, and when it waits for it: read off Triton's intermediate code.

A pipelined loop asks for a later tile while it works on this one. `wait_distances` says how much work lies between: 0
where the loop waits as soon as it has asked, 1 where a whole tile's products are issued in between. Triton keeps loads
in rings of shared memory; `cp.async` copies are waited for by their number (all but the latest n groups), TMA's copies
by the mbarrier that each is given.
"""
import re
from typing import NamedTuple

LOOP = re.compile(r"^( *)(?:%[^=\n]+ = )?scf\.(?:for|while)\b", re.MULTILINE)
PRODUCT = re.compile(r"\b(?:ttng\.warp_group_dot|ttng\.tc_gen5_mma|tt\.dot) ")
COMMIT = re.compile(r"\bttg\.async_commit_group\b")
WAIT = re.compile(r"\bttg\.async_wait\b.*\bnum = (\d+)")
TMA_COPY = re.compile(r"\bttng\.async_tma_copy_global_to_local %[\w#]+\[[^\]]*\] %[\w#]+, (%[\w#]+)")
TMA_WAIT = re.compile(r"\bttng\.wait_barrier (%[\w#]+),")


class Load(NamedTuple):
    """A load of a loop's tile: products of the loop before it is issued, and before the loop waits for it.

    `ahead`: how many rounds of the loop later that wait comes.
    """

    issued: int
    waited: int
    ahead: int


def innermost_loops(code: str) -> list[tuple[int, int]]:
    """Where each loop with a product begins and ends that has no such loop within it."""
    loops = []
    for loop in LOOP.finditer(code):
        end = re.compile(rf"^{loop[1]}\}}(?! do)", re.MULTILINE).search(code, loop.end()).start()
        if PRODUCT.search(code, loop.end(), end):
            loops.append((loop.start(), end))
    return [(a, b) for a, b in loops if not any(a < c and d <= b for c, d in loops)]


def products_before(body: str, place: int) -> int:
    """How many products of a loop's round come before a place."""
    return len(PRODUCT.findall(body, 0, place))


def copies_in_groups(body: str) -> list[Load]:
    """The groups of cp.async copies of a loop."""
    commits = [m.start() for m in COMMIT.finditer(body)]
    waits = [(m.start(), int(m[1])) for m in WAIT.finditer(body)]
    found = []
    for commit in commits if waits else []:
        # newer groups by the time of a wait: those behind this one, whole rounds of them, those before the wait
        ahead, waited = next(
            (rounds, wait) for rounds in range(100) for wait, latest in waits
            if (rounds or wait > commit)
            and rounds * len(commits) + sum(c < wait for c in commits) - commits.index(commit) - 1 >= latest)
        found.append(Load(products_before(body, commit), products_before(body, waited), ahead))
    return found


def of_rings(pattern: re.Pattern, code: str, start: int, end: int) -> list[tuple[str, int]]:
    """The ring of mbarriers that each copy or wait in code[start:end] names, and where it stands.

    An mbarrier is an element of its ring, or alone. Names return in other regions: the last definition before counts.
    """
    found = []
    for m in pattern.finditer(code, start, end):
        elements = list(re.finditer(rf"{re.escape(m[1])} = ttg\.memdesc_index (%[\w#]+)\[", code[:m.start()]))
        found.append((elements[-1][1] if elements else m[1], m.start()))
    return found


def copies_by_tma(code: str, start: int, end: int) -> list[Load]:
    """The copies by TMA of the loop at code[start:end]: what was asked for before the loop is waited for first."""
    copies, waits = (of_rings(pattern, code, start, end) for pattern in (TMA_COPY, TMA_WAIT))
    before, waited_before = ([ring for ring, _ in of_rings(pattern, code, 0, start)]
                             for pattern in (TMA_COPY, TMA_WAIT))
    rings, body, found = [ring for ring, _ in copies], code[start:end], []
    for ring, place in copies:
        waited = next(place for waited, place in waits if waited == ring)
        ahead = before.count(ring) // rings.count(ring) - waited_before.count(ring)  # several copies share an mbarrier
        found.append(Load(products_before(body, place - start), products_before(body, waited - start), ahead))
    return found


def wait_distances(code: str) -> list[float]:
    """For each innermost loop with a product and an asynchronous copy: the products, in tiles, that its round issues
    between the copy that is waited for soonest and that wait."""
    found = []
    for start, end in innermost_loops(code):
        body = code[start:end]
        tile = len(PRODUCT.findall(body))
        loads = copies_in_groups(body) + copies_by_tma(code, start, end)
        if loads:
            found.append(min(load.ahead + (load.waited - load.issued) / tile for load in loads))
    return found
