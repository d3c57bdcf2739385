"""`python -m everpool.agent FOLDER URL`"""

from everpool.agent.server import main

main()
