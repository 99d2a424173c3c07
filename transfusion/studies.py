"""`python -m transfusion.studies`: the paper's tables, small, which are `transfusion.recipes.studies`."""
from transfusion.recipes.studies.command import main

if __name__ == "__main__":
    main()
