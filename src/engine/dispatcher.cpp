#include "engine/dispatcher.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include "engine/partial.hpp"

namespace stream_cqsa {
namespace {

// Subproblems that are compared for the sake of chunks that a worker keeps.
constexpr std::size_t candidates = 32;

// Of a subproblem.
Dispatcher::Work work_of(const Plan& plan, const Dispatcher::Lacking& lacking, std::int64_t id) {
  const QuorumWork quorum = plan.work(id);
  const SubproblemKey key = plan.key(id);
  Dispatcher::Work work;
  work.wanted.assign(quorum.chunks.size(), false);
  std::vector<bool> used(quorum.chunks.size(), false);
  for (std::size_t pair = 0; pair < quorum.pairs.size(); ++pair) {
    const auto query = static_cast<std::size_t>(quorum.pairs[pair].query);
    if (pair == 0 || quorum.pairs[pair - 1].query != quorum.pairs[pair].query) {
      const std::int64_t pieces = lacking(key, quorum.chunks[query].index);
      work.pieces += pieces;
      work.wanted[query] = pieces > 0;
    }
    if (!work.wanted[query]) continue;
    used[query] = used[static_cast<std::size_t>(quorum.pairs[pair].key)] = true;
  }
  for (std::size_t i = 0; i < used.size(); ++i) {
    if (used[i]) work.chunks.push_back({key.batch, key.group, quorum.chunks[i].index});
  }
  return work;
}

}  // namespace

Dispatcher::Dispatcher(const Plan& plan, int workers, const Options& options, Lacking lacking)
    : Dispatcher(plan.subproblem_count(), workers, options,
                 [&plan, lacking = std::move(lacking)](std::int64_t id) {
                   return work_of(plan, lacking, id);
                 }) {}

Dispatcher::Dispatcher(std::int64_t count, int workers, const Options& options, Describe describe)
    : count_(count),
      held_from_(options.held_from),
      options_(options),
      describe_(std::move(describe)),
      workers_(static_cast<std::size_t>(workers)) {
  fill();
}

int Dispatcher::workers_left() const {
  return static_cast<int>(
      std::count_if(workers_.begin(), workers_.end(), [](const Worker& w) { return !w.lost; }));
}

// --- subproblems that no worker has ---

// Looks at more subproblems until there are candidates enough.
void Dispatcher::fill() {
  while (cursor_ < std::min(count_, held_from_) && open_.size() < candidates) {
    const std::int64_t id = cursor_++;
    if (add(id)) open_.insert(id);
  }
  forget_merged();
}

// False where nothing of it is lacking.
bool Dispatcher::add(std::int64_t id) {
  Work work = describe_(id);
  if (work.pieces == 0) return false;
  tasks_.emplace(id, Task{std::move(work), {}, false});
  return true;
}

bool Dispatcher::has_come_to_held() {
  fill();
  return held_from_ < count_ && cursor_ >= held_from_ && open_.empty();
}

void Dispatcher::leave_held() {
  count_ = std::min(count_, held_from_);
  forget_merged();
}

// --- assignment ---

std::optional<Dispatcher::Order> Dispatcher::next(int number) {
  Worker& worker = workers_[static_cast<std::size_t>(number)];
  if (worker.lost) return std::nullopt;
  fill();
  if (oldest_is_stranded() && !worker.abandoned.contains(oldest_)) return assign(number, oldest_);
  if (static_cast<int>(worker.computing.size()) >= options_.ahead) return std::nullopt;
  if (const auto id = choose(worker)) {
    if (options_.now && others_have_less(worker)) return std::nullopt;
    return assign(number, *id);
  }
  if (!worker.computing.empty()) return std::nullopt;
  const auto again = choose_again(worker);
  if (again && may_take(worker, *again)) return assign(number, *again);
  return std::nullopt;
}

// Nobody has the oldest subproblem, and everybody has later ones whose partials wait for it.
bool Dispatcher::oldest_is_stranded() const {
  return open_.contains(oldest_) &&
         std::none_of(workers_.begin(), workers_.end(), [&](const Worker& worker) {
           return !worker.lost && may_take(worker, oldest_);
         });
}

// Of the subproblems that the worker may take, the one with the fewest chunks that it lacks. The
// oldest may only be passed over for one whose partials are sure to find room.
std::optional<std::int64_t> Dispatcher::choose(const Worker& worker) const {
  std::optional<std::int64_t> best;
  std::int64_t fewest = std::numeric_limits<std::int64_t>::max();
  std::size_t compared = 0;
  for (const std::int64_t id : open_) {
    if (id != *open_.begin() && id >= oldest_ + options_.window) break;
    if (++compared > candidates) break;
    if (!may_take(worker, id)) continue;
    const std::int64_t missing = missing_chunks(worker, tasks_.at(id));
    if (missing >= fewest) continue;
    fewest = missing;
    best = id;
  }
  return best;
}

bool Dispatcher::may_take(const Worker& worker, std::int64_t id) const {
  if (worker.abandoned.contains(id)) return false;
  if (worker.delivering.empty()) return true;
  const std::int64_t last = *worker.delivering.rbegin();
  return id > last || last < oldest_ + options_.window;
}

std::int64_t Dispatcher::missing_chunks(const Worker& worker, const Task& task) const {
  return std::count_if(task.work.chunks.begin(), task.work.chunks.end(),
                       [&](const ChunkKey& chunk) { return !worker.kept.contains(chunk); });
}

bool Dispatcher::others_have_less(const Worker& worker) const {
  return std::any_of(workers_.begin(), workers_.end(), [&](const Worker& other) {
    return !other.lost && other.computing.size() < worker.computing.size() &&
           may_take(other, *open_.begin());
  });
}

// What is late may be found late by this, in seconds.
constexpr double again_after = 0.001;

// The answer for one worker is none for every slower one: thousands that are idle must not each
// look at thousands.
std::optional<std::int64_t> Dispatcher::choose_again(const Worker& idle) {
  const double own = seconds_each(idle);
  const double at = now();
  const bool alike = nothing_for_ && own >= *nothing_for_ && (own > 0) == (*nothing_for_ > 0);
  if (alike && at < nothing_at_ + again_after) return std::nullopt;
  const auto chosen = latest_of_others(own, at);
  if (!chosen) {
    nothing_for_ = own;
    nothing_at_ = at;
  }
  return chosen;
}

// What another worker will be done with last, if no second one has it yet and one that needs `own`
// seconds should be done with it sooner.
std::optional<std::int64_t> Dispatcher::latest_of_others(double own, double at) const {
  constexpr double clearly = 0.8;
  constexpr double for_ever = 1e9;  // seconds
  std::optional<std::int64_t> chosen;
  double longest = 0;
  for (const Worker& worker : workers_) {
    if (worker.computing.empty()) continue;
    const double each = seconds_each(worker);
    const double passed = at - worker.began;
    // Of one that takes twice as long as it should nobody knows when it ends, or whether.
    const double late = own > 0 && passed > 2 * std::max(each, own) ? for_ever : 0;
    std::int64_t place = 0;
    for (const std::int64_t id : worker.computing) {
      ++place;
      const auto task = tasks_.find(id);
      if (task == tasks_.end() || task->second.workers.size() != 1) continue;
      if (worker.withdrawn.contains(id)) continue;
      // While nobody knows how long one takes, what waits behind another takes longer.
      const double left = own > 0 ? static_cast<double>(place) * each - passed + late
                                  : static_cast<double>(options_.now ? place - 1 : place);
      if (own >= clearly * left || left < longest) continue;
      longest = left;
      chosen = id;
    }
  }
  return chosen;
}

double Dispatcher::seconds_each(const Worker& worker) const {
  if (worker.computed > 0) return worker.busy / static_cast<double>(worker.computed);
  return computed_ > 0 ? busy_ / static_cast<double>(computed_) : 0;
}

Dispatcher::Order Dispatcher::assign(int number, std::int64_t id) {
  Worker& worker = workers_[static_cast<std::size_t>(number)];
  nothing_for_.reset();
  Order order;
  if (!may_take(worker, id)) {
    order.abandon.assign(worker.delivering.begin(), worker.delivering.end());
    for (const std::int64_t waiting : order.abandon) take_back(number, waiting);
    worker.abandoned.insert(order.abandon.begin(), order.abandon.end());
  }
  Task& task = tasks_.at(id);
  if (open_.erase(id) == 0) ++repeated_;
  task.workers.insert(number);
  if (worker.computing.empty()) worker.began = now();
  worker.computing.insert(id);
  worker.delivering.insert(id);
  keep_chunks(worker, task);
  order.assignment.id = id;
  order.assignment.wanted = task.work.wanted;
  return order;
}

// The worker keeps the chunks that it used last, as far as it has room.
void Dispatcher::keep_chunks(Worker& worker, const Task& task) const {
  ++worker.orders;
  for (const ChunkKey& chunk : task.work.chunks) worker.kept[chunk] = worker.orders;
  while (static_cast<std::int64_t>(worker.kept.size()) > options_.chunks_kept) {
    worker.kept.erase(std::min_element(
        worker.kept.begin(), worker.kept.end(),
        [](const auto& one, const auto& other) { return one.second < other.second; }));
  }
}

// --- what comes back ---

void Dispatcher::computed(int number, std::int64_t id) {
  Worker& worker = workers_[static_cast<std::size_t>(number)];
  if (worker.computing.erase(id) == 0) return;
  nothing_for_.reset();
  const double end = now();
  const double took = end - std::exchange(worker.began, end);
  worker.busy += took;
  busy_ += took;
  ++worker.computed;
  ++computed_;
  worker.withdrawn.erase(id);
  withdraw(id);
}

// From all who compute it still, or are to.
void Dispatcher::withdraw(std::int64_t id) {
  for (std::size_t number = 0; number < workers_.size(); ++number) {
    Worker& worker = workers_[number];
    if (worker.computing.contains(id) && worker.withdrawn.insert(id).second)
      withdrawals_.push_back({static_cast<int>(number), id});
  }
}

void Dispatcher::left_out(int number, std::int64_t id) {
  Worker& worker = workers_[static_cast<std::size_t>(number)];
  ++withdrawn_;
  if (worker.abandoned.erase(id) == 0) take_back(number, id);
}

void Dispatcher::received(int number, std::int64_t id) {
  Worker& worker = workers_[static_cast<std::size_t>(number)];
  if (worker.abandoned.erase(id) > 0) return;
  nothing_for_.reset();
  worker.delivering.erase(id);
  const auto task = tasks_.find(id);
  if (task == tasks_.end()) return;
  task->second.workers.erase(number);
  task->second.received = true;
}

void Dispatcher::merged_piece(std::int64_t id) {
  const auto task = tasks_.find(id);
  if (task == tasks_.end() || --task->second.work.pieces > 0) return;
  open_.erase(id);
  tasks_.erase(task);
  forget_merged();
}

void Dispatcher::forget_merged() { oldest_ = tasks_.empty() ? cursor_ : tasks_.begin()->first; }

void Dispatcher::take_back(int number, std::int64_t id) {
  Worker& worker = workers_[static_cast<std::size_t>(number)];
  nothing_for_.reset();
  worker.computing.erase(id);
  worker.withdrawn.erase(id);
  worker.delivering.erase(id);
  const auto task = tasks_.find(id);
  if (task == tasks_.end()) return;
  task->second.workers.erase(number);
  if (task->second.received) return;
  // It may have been withdrawn for the sake of partials that do not come.
  for (Worker& other : workers_) other.withdrawn.erase(id);
  if (task->second.workers.empty()) open_.insert(id);
}

void Dispatcher::lost(int number, bool with_partials) {
  Worker& worker = workers_[static_cast<std::size_t>(number)];
  worker.lost = true;
  const auto given_back = with_partials ? worker.delivering : worker.computing;
  for (const std::int64_t id : given_back) take_back(number, id);
}

}  // namespace stream_cqsa
