"""The defined words of the report page: what stands behind a mark, said here once."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from moe_lab.results.contest import COLLAPSED, SAME_BITS
from moe_lab.results.verdicts import SAME

TERMS = {
    "anchor": ("The variant that the others of a setting are compared with: sweep.anchor, or else the first."),
    "cell": "One run of the sweep: a variant in a setting.",
    "setting": "What compared cells share: the model, the sizes, the dtype, the load and so on.",
    "variant": "What is compared: how the cells of a setting differ (sweep.compare).",
    "median ms": (
        "The median time of one iteration, and in brackets its 95 % interval. A ~ stands before a latency that is "
        "not stable."
    ),
    "stable": "A latency whose 95 % interval is narrower than measure.target_ci.",
    "x anchor": "The latency over that of the anchor, timed in the same rounds, and its 95 % interval.",
    "x default": (
        "Of a search: the latency over that of the default, which is the configuration without what is searched, timed "
        "in the same rounds."
    ),
    "interval": (
        "A 95 % interval: of 100 such intervals, about 95 have the true value in them. Two variants differ if the "
        f"interval of their ratio excludes 1; within {SAME:.0%} they are the same."
    ),
    "no interval": ("A value from too few rounds for an interval (hollow in the plots). Nothing is concluded from it."),
    "bits per byte": (
        "How badly the model predicts the text: -log2 of the probability of each next token, per byte of text. "
        "Less is better. In brackets stand the difference from the checkpoint's own router and its 95 % interval. "
        f"Up to {SAME_BITS} do not matter; from {COLLAPSED - 1:.0%} more on, the predictions collapse."
    ),
    "collapse": (f"The model needs at least {COLLAPSED - 1:.0%} more bits per byte than with its own router."),
    "KL to native": (
        "The Kullback-Leibler divergence of the predictions from those with the checkpoint's own router, in nats. "
        "0 is no difference."
    ),
    "top-1 agreement": ("The share of tokens whose most likely successor is that of the checkpoint's own router."),
    "output error": (
        "The relative difference of the output from that of the reference router (measure.reference_router). In "
        "brackets stands the floor, which is the effect of rounding alone."
    ),
    "relative error": (
        "Of the output, compared with the fp32 reference that uses the same routing. It is the check that what "
        "was timed is right."
    ),
    "load max / mean": "The slots of the busiest expert over the mean. 1 is an even load.",
    "dead experts": "Experts that no token uses.",
    "fewest experts": ("The experts in use in the layer with the fewest, and how many uniform routing would use."),
    "experts MB": "The weights of the experts in use, in MB, which one pass reads; the sum of all layers.",
    "dropped tokens": "The share of the tokens without any expert.",
    "unused slots": (
        "The share of the slots that are unused: dropped by a capacity, or left empty by a router with a variable "
        "number of experts per token."
    ),
    "top-k mass": "The probability that a token's experts have together; mean over the tokens.",
    "peak MB": "The peak of memory in one iteration: on CUDA of the allocator, on the CPU of the whole process.",
    "near ties": ("Tokens whose experts have scores that are equal but for rounding, so that either choice is right."),
    "launch-bound": ("The GPU waited for the host, so the latency is that of launches and not of kernels."),
    "busy machine": "Other processes used the processor during the timing.",
    "causal": (
        "A token's experts do not depend on later tokens. A router that is not causal cannot generate text, and "
        "its bits per byte are flattered, because it sees the text that it predicts."
    ),
    "batch_invariant": "A token's experts do not depend on the other tokens of the batch.",
    "static_k": "Every token uses all of its slots.",
    "calibrates": "It is fitted once, in a pass over other tokens, before it is timed.",
    "graph_safe": "The router does not wait for the host, so a CUDA graph can hold it.",
    "text information": (
        "How much information an expert gives about the text it is used for: I(expert; text) / H(text), mean over "
        "the layers."
    ),
    "Jaccard": ("The experts that two routings of a token share, over all experts in either; mean over the tokens."),
    "dominated": (
        "Another variant of the setting is no worse in quality, time and bytes of experts, and surely better in one of "
        "them. What no other dominates is the Pareto front."
    ),
    "J / token": (
        "The energy of an iteration over its tokens, by the device's own counter. It counts all that the device does, "
        "and idle power is not subtracted."
    ),
    "energy x anchor": (
        "The energy per token over that of the anchor. It has no interval, so nothing is concluded from it."
    ),
    "counter share": (
        "How much of the energy may be that of what ran before, because the counter is renewed only now and then."
    ),
    "T": "The tokens of a pass: batch x seq_len. Of decoding it is batch x workload.window.",
}
"""Word -> meaning."""

_OTHERS = {
    "not causal": "causal",
    "predictions collapse": "collapse",
    "not stable": "stable",
    "intervals": "interval",
    "settings": "setting",
    "cells": "cell",
    "Cells": "cell",
    "variants": "variant",
    "without an interval": "no interval",
    "T": "T",
}
_WORDS = {**{word: word for word in TERMS}, **_OTHERS}
_LONGEST_FIRST = "|".join(sorted(map(re.escape, _WORDS), key=len, reverse=True))
_PATTERN = re.compile(rf"(?<![\w=./-])(?:{_LONGEST_FIRST})(?![\w=/-]|\.\w)")


def ident(term: str) -> str:
    """Of the definition in the page."""
    return "term-" + re.sub(r"\W+", "-", term.lower())


def mark(text: str) -> Markup:
    """The text as HTML, the first use of each defined word a button that shows what it means."""
    parts, at, used = [], 0, set()
    for match in _PATTERN.finditer(text):
        term = _WORDS[match[0]]
        if term in used:
            continue
        used.add(term)
        parts += [escape(text[at : match.start()]), button(match[0], term)]
        at = match.end()
        if text[at : at + 1] in tuple(".,;:"):  # which may not begin a line
            parts[-1] = Markup('<span class="joined">{}{}</span>').format(parts[-1], text[at])
            at += 1
    return Markup("").join([*parts, escape(text[at:])])


def term(text: str) -> Markup:
    """A heading that is a defined word as a button, any other as it is."""
    return button(text, text) if text in TERMS else escape(text)


def button(text: str, term: str) -> Markup:
    """Works by mouse, touch and keyboard; without popovers the definitions stand at the end of the page."""
    return Markup('<button type="button" class="term" popovertarget="{}">{}</button>').format(ident(term), text)
