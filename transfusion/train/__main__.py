"""`python -m transfusion.train PRESET ...`: `transfusion train` under another name."""
from transfusion.train.transfusion import main

if __name__ == "__main__":
    main()
