"""`python -m transfusion.showcase`: the emoji showcase, which is `transfusion.recipes.showcase`."""
from transfusion.recipes.showcase import main

if __name__ == "__main__":
    main()
