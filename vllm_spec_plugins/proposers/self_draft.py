# SPDX-License-Identifier: Apache-2.0
"""Token trees from part of the target itself: no weights beside it, and no K/V.

Elhoushi et al., "LayerSkip", arXiv 2404.16710 (the first layers draft); Zhang et al., "Draft & Verify", arXiv 2309.08168 (some
blocks are left out); Xia et al., "SWIFT", arXiv 2410.06916 (which ones is found while serving). They draft chains; here the
part's best tokens at every node are children of a tree, as a draft model's are.
"""

from __future__ import annotations

from vllm_spec_plugins.proposers.specinfer import SpecInferProposer


class SelfDraftProposer(SpecInferProposer):
    """Grows a tree level by level, one pass through part of the target over each level."""

    name = "self-draft"
