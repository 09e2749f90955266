# SPDX-License-Identifier: Apache-2.0
"""Token trees, self-speculation and layer plans for the vLLM serving engine."""
