"""Pairs of finite-state policies, and the divergences on which they are compared with the tree."""

from __future__ import annotations

import pytest

from opdtheory import FiniteStatePolicy, MarkovPolicy

AUTOMATA = {
    "n-grams of order 2": lambda eos, T: [FiniteStatePolicy.ngram(3, T, 2, eos=eos, seed=s) for s in (0, 1)],
    "orders 2 and 1": lambda eos, T: [FiniteStatePolicy.ngram(3, T, k, eos=eos, seed=k) for k in (2, 1)],
    "a chain and order 2": lambda eos, T: [
        MarkovPolicy.random(3, T, eos=eos),
        FiniteStatePolicy.ngram(3, T, 2, eos=eos, seed=1),
    ],
    "other states": lambda eos, T: [FiniteStatePolicy.random(3, T, k, eos=eos, seed=k) for k in (4, 3)],
    "other starts": lambda eos, T: [
        FiniteStatePolicy(random.table, random.successors, T, start=k - 1, eos=eos)
        for k in (4, 3)
        for random in [FiniteStatePolicy.random(3, T, k, seed=k)]
    ],
    "no memory": lambda eos, T: [FiniteStatePolicy.ngram(3, T, 0, eos=eos, seed=s) for s in (0, 1)],
}
by_automata = pytest.mark.parametrize("pair", AUTOMATA.values(), ids=AUTOMATA)
by_eos = pytest.mark.parametrize("eos", [None, 1])


ENTRIES = [
    "reverse_kl",
    "forward_kl",
    "jsd",
    "chi2",
    "neyman_chi2",
    "hellinger",
    "total_variation",
    "le_cam",
    "jeffreys",
    ("skew_jsd", {"beta": 0.1}),
    ("alpha", {"alpha": -1.3}),
    ("alpha", {"alpha": 0.0}),
    ("alpha", {"alpha": 1.0}),
    ("alpha", {"alpha": 2.5}),
    ("skew_forward_kl", {"lam": 0.1}),
    ("skew_reverse_kl", {"lam": 0.1}),
]

# Divergences of whole sequences that factor along a chain.
FACTORING = [
    "reverse_kl",
    "forward_kl",
    "jeffreys",
    "chi2",
    "neyman_chi2",
    "hellinger",
    *(("alpha", {"alpha": alpha}) for alpha in (-1.5, 0.0, 0.4, 1.0, 3.0)),
]


def chains(vocab_size, horizon, eos=None, scale=1.0):
    return tuple(MarkovPolicy.random(vocab_size, horizon, eos=eos, scale=scale, seed=seed) for seed in (0, 1))
