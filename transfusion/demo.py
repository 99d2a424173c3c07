"""`python -m transfusion.demo`: the digits demo, which is `transfusion.recipes.demo`."""
from transfusion.recipes.demo import main

if __name__ == "__main__":
    main()
