"""dicompile: a compiler for diffusion transformers."""

from dicompile.api import CachedModel as CachedModel
from dicompile.api import optimize as optimize
from dicompile.api import plan_of as plan_of
from dicompile.api import report as report
from dicompile.api import restore as restore
from dicompile.api import structure_of as structure_of
from dicompile.errors import DicompileError as DicompileError
from dicompile.plan import Cadence as Cadence
from dicompile.plan import Fitted as Fitted
from dicompile.plan import Forecast as Forecast
from dicompile.plan import Plan as Plan
from dicompile.plan import Policy as Policy
from dicompile.plan import Refresh as Refresh
from dicompile.plan import Reuse as Reuse
from dicompile.plan import Rule as Rule
from dicompile.plan import Table as Table
from dicompile.plan import TimestepSchedule as TimestepSchedule
from dicompile.plan import TokenScore as TokenScore
from dicompile.plan import TokenTable as TokenTable
from dicompile.policies import FORA as FORA
from dicompile.policies import DuCa as DuCa
from dicompile.policies import DuCaFlux as DuCaFlux
from dicompile.policies import DuCaOpenSora as DuCaOpenSora
from dicompile.policies import DuCaPixArt as DuCaPixArt
from dicompile.policies import NoCache as NoCache
from dicompile.policies import TaylorSeer as TaylorSeer
from dicompile.policies import TaylorSeerLite as TaylorSeerLite
from dicompile.policies import ToCa as ToCa
from dicompile.policies import ToCaFlux as ToCaFlux
from dicompile.policies import ToCaOpenSora as ToCaOpenSora
from dicompile.policies import ToCaPixArt as ToCaPixArt
from dicompile.policies import get_policy as get_policy
from dicompile.runtime import cache_context as cache_context
from dicompile.runtime import session as session

__version__ = "0.1.0"
