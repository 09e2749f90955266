# SPDX-License-Identifier: Apache-2.0
"""How deep a token is computed: layer plans, schedules, exit policies. Pure: knows neither vLLM nor models."""
