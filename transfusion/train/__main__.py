"""`python -m transfusion.train PRESET ...`: `transfusion train` under another name."""
from transfusion.recipes.command_line import train_main

if __name__ == "__main__":
    train_main()
