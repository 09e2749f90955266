# SPDX-License-Identifier: Apache-2.0
"""Cascades of a cheap stage and the full model: deferral rules, routes, calibration. Pure torch: no vLLM in here."""
