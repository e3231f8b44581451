"""SemanticSAM of backbone, method and heads, its adapter file, its cached features; no training."""
