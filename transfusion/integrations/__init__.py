"""A Transfusion model called as other libraries call theirs: diffusers' and transformers' pipelines."""
