"""SemanticSAM: backbone, method and heads put together, and its adapter file; no training."""
