# SPDX-License-Identifier: Apache-2.0
"""``vllm-spec train``: what drafts for a model, trained on that model."""
