"""Pixels as (P, H, W, C): planes, regions, tiles, scale, place; no files, labels or models."""
