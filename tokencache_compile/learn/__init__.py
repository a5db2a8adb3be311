"""The learned part: predictor training, LoRA refinement, calibration and tuning. One stage a file."""
