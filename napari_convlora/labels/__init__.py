"""What integers of a label image mean: classes, annotations, reviewed regions; no model."""
