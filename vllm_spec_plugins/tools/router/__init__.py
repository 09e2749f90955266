# SPDX-License-Identifier: Apache-2.0
"""``vllm-spec router``: one OpenAI-compatible server in front of several vLLM servers, the cheapest asked first."""
