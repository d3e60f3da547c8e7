// Runs the grid of a launch: warps take turns, lanes of a warp that have parted meet again where they can.
#pragma once

#include <limits>
#include <memory>
#include <random>
#include <utility>

#include "traffic.h"

namespace emulator {

class Launch {
 public:
  // seed: of the order in which blocks and warps run and how far each does at a time; 0: in turn.
  Launch(const Kernel& kernel, int blocks, int threads, uint32_t dynamic_shared_bytes, int cluster, bool cooperative,
         void* const* arguments, FindAllocation find, uint64_t seed)
      : kernel_(kernel),
        blocks_(blocks),
        threads_(threads),
        cluster_(cluster),
        at_once_(cooperative ? blocks : cluster),
        dynamic_shared_((kernel.static_shared_bytes + 15) / 16 * 16),
        shared_bytes_(dynamic_shared_ + dynamic_shared_bytes),
        parameters_(kernel.parameter_bytes),
        shuffled_(seed != 0),
        random_(seed) {
    if (threads % kLanes) fail("blocks of %d threads are not emulated", threads);
    for (size_t p = 0; p < kernel.parameter_offsets.size(); ++p)
      std::memcpy(&parameters_[kernel.parameter_offsets[p]], arguments[p], kernel.parameter_sizes[p]);
    GlobalMemory::get().begin(find, grid_barrier_, sizeof grid_barrier_);
  }

  void run() {
    std::vector<int> firsts;
    for (int first = 0; first < blocks_; first += at_once_) firsts.push_back(first);
    if (shuffled_) std::shuffle(firsts.begin(), firsts.end(), random_);
    make_blocks();
    for (const int first : firsts) {
      place_blocks(first);
      run_warps();
    }
  }

 private:
  // -------------------------------------------------------------------------------------------- what is resident

  // The blocks that run together, once; place_blocks makes them others of the grid in turn.
  void make_blocks() {
    for (int b = 0; b < at_once_; ++b) {
      if (b % cluster_ == 0) {
        clusters_.push_back(std::make_unique<Cluster>());
        clusters_.back()->threads = cluster_ * threads_;
      }
      Cluster& cluster = *clusters_.back();
      resident_.push_back(std::make_unique<Block>());
      Block& block = *resident_.back();
      block.cluster = &cluster, block.rank = b % cluster_, block.threads = threads_;
      cluster.blocks.push_back(&block);
      for (int thread = 0; thread < threads_; thread += kLanes) make_warp(block, thread);
    }
  }

  void make_warp(Block& block, int first_thread) {
    warps_.push_back(std::make_unique<Warp>());
    Warp& w = *warps_.back();
    w.kernel = &kernel_, w.block = &block, w.parameters = parameters_.data(), w.first_thread = first_thread;
    w.registers.assign(kernel_.register_bytes, 0xcd);
    w.predicates.assign(std::max(kernel_.predicates, 1), 0);
    for (const auto& [name, place] : kernel_.special)
      for (int lane = 0; lane < kLanes; ++lane) w.set(place, lane, special(name, first_thread + lane));
    block.warps.push_back(&w);
  }

  void place_blocks(int first) {
    for (const auto& cluster : clusters_) {
      cluster->arrived = cluster->ended = 0;
      cluster->phase = 0;
      cluster->relaxed.assign(1, false);
    }
    for (const auto& block : resident_) {
      block->index = first++;
      block->arrived = block->ended = 0;
      block->barriers = 0;
      block->shared.assign(shared_bytes_, 0xff);
      block->history.assign(shared_bytes_, {});
    }
    const auto index = kernel_.special.find("%ctaid.x");
    for (const auto& warp : warps_) {
      warp->restart();
      if (index == kernel_.special.end()) continue;
      for (int lane = 0; lane < kLanes; ++lane) warp->set(index->second, lane, warp->block->index);
    }
  }

  uint64_t special(const std::string& name, int thread) const {
    const auto grid_barrier = reinterpret_cast<uint64_t>(grid_barrier_);
    if (name.rfind("dynamic shared memory", 0) == 0) return kSharedBase + dynamic_shared_;
    if (name == "%tid.x") return thread;
    if (name == "%ntid.x") return threads_;
    if (name == "%ctaid.x") return 0;  // place_blocks sets it
    if (name == "%nctaid.x") return blocks_;
    if (name == "%laneid") return thread % kLanes;
    if (name == "%envreg1") return grid_barrier >> 32;  // of cooperative launches
    if (name == "%envreg2") return grid_barrier;
    if (name.ends_with(".y") || name.ends_with(".z")) return name[1] == 'n' ? 1 : 0;
    fail("no special register %s", name.c_str());
  }

  // -------------------------------------------------------------------------------------------- turns

  void run_warps() {
    constexpr int kMaxTurns = 1 << 13;
    int turns = 0;
    std::vector<Warp*> order;
    for (const auto& warp : warps_) order.push_back(warp.get());
    for (bool ended = false; !ended;) {
      bool progress = false;
      if (++turns > kMaxTurns) fail("no end in sight: threads wait in a loop");
      ended = true;
      if (shuffled_) std::shuffle(order.begin(), order.end(), random_);
      for (Warp* warp : order) {
        if (warp->ended == ~0u) continue;
        ended = false;
        const uint64_t before = warp->executed;
        run_warp(*warp, shuffled_ ? 1 + random_() % 200 : 2000);
        progress |= warp->executed != before;
      }
      if (!ended && !progress) report_deadlock();
    }
    for (const auto& warp : warps_) Traffic::get().executed(std::exchange(warp->executed, 0));
    for (const auto& warp : warps_)
      for (const auto& copies : warp->copies)
        if (!copies.empty()) fail("a thread has ended before its copies to shared memory arrived");
  }

  [[noreturn]] void report_deadlock() const {
    std::map<std::string, int> waiting;
    for (const auto& warp : warps_)
      for (int lane = 0; lane < kLanes; ++lane)
        if (!(warp->ended >> lane & 1)) ++waiting[kernel_.code[warp->at[lane]].text];
    std::string where;
    for (const auto& [text, threads] : waiting) where += " " + std::to_string(threads) + " threads at '" + text + "'";
    fail("deadlock:%s", where.c_str());
  }

  // Runs up to so many instructions. Of lanes at different places those that are furthest behind run first.
  void run_warp(Warp& w, int instructions) {
    while (instructions > 0) {
      const Mask runnable = ~(w.ended | w.at_warp_sync | w.at_barrier | w.at_cluster);
      if (!runnable) return;
      constexpr int kNowhere = std::numeric_limits<int>::max();
      int at = kNowhere, next_lanes = kNowhere;
      each_lane(runnable, [&](int lane) { at = std::min(at, w.at[lane]); });
      Mask group = 0;
      each_lane(runnable, [&](int lane) {
        if (w.at[lane] == at)
          group |= Mask{1} << lane;
        else
          next_lanes = std::min(next_lanes, w.at[lane]);
      });
      while (at < next_lanes && instructions-- > 0) {
        const Instruction& i = kernel_.code[at];
        Mask lanes = group;
        if (i.guard >= 0) lanes &= i.guard_negated ? ~w.predicates[i.guard] : w.predicates[i.guard];
        ++w.executed;
        if (i.flow == Flow::kNext) {
          if (lanes) i.execute(w, i, lanes);
          ++at;
        } else if (!lanes) {
          ++at;
        } else if (i.flow == Flow::kBranch && lanes == group) {
          at = static_cast<int>(i.offset);
        } else {
          put(w, group, at);
          depart(w, i, group, lanes, at);
          group = 0;
          break;
        }
      }
      put(w, group, at);
    }
  }

  static void put(Warp& w, Mask lanes, int at) {
    each_lane(lanes, [&](int lane) { w.at[lane] = at; });
  }

  // What may let the lanes of a group part: those that execute the instruction, and the others, which go on.
  void depart(Warp& w, const Instruction& i, Mask group, Mask lanes, int at) {
    put(w, group & ~lanes, at + 1);
    Block& block = *w.block;
    Cluster& cluster = *block.cluster;
    switch (i.flow) {
      case Flow::kBranch:
        put(w, lanes, static_cast<int>(i.offset));
        break;
      case Flow::kTrap:
        fail("trap");
      case Flow::kExit:
        w.ended |= lanes;
        block.ended += std::popcount(lanes), cluster.ended += std::popcount(lanes);
        if (block.arrived > 0) fail("threads end while others of their block wait at a barrier");
        if (cluster.arrived > 0) fail("threads end while others of their cluster wait at its barrier");
        break;
      case Flow::kWarpSync:
      case Flow::kShuffle:
        synchronize_warp(w, i, lanes, at);
        break;
      case Flow::kBarrier:
        if (block.ended > 0) fail("a barrier after threads of the block have ended");
        w.at_barrier |= lanes;
        block.arrived += std::popcount(lanes);
        if (block.arrived == block.threads) pass_barrier(block);
        break;
      case Flow::kClusterArrive:
        if (cluster.ended > 0) fail("a cluster's barrier after threads of it have ended");
        each_lane(lanes, [&](int lane) {
          if (w.cluster_arrivals[lane]++ != w.cluster_waits[lane]) fail("an arrival before the wait for the last");
        });
        if (i.option) cluster.relaxed[cluster.phase] = true;
        put(w, lanes, at + 1);
        cluster.arrived += std::popcount(lanes);
        if (cluster.arrived == cluster.threads) pass_barrier(cluster);
        break;
      case Flow::kClusterWait:
        wait_for_cluster(w, lanes, at);
        break;
      case Flow::kNext:
        break;
    }
  }

  // Lanes that are named in the mask wait for each other at the same instruction.
  static void synchronize_warp(Warp& w, const Instruction& i, Mask lanes, int at) {
    Mask arrived = lanes;
    each_lane(w.at_warp_sync, [&](int lane) {
      if (w.at[lane] == at) arrived |= Mask{1} << lane;
    });
    const Mask named = w.lanes<uint32_t>(i.d)[std::countr_zero(lanes)];
    if (lanes & ~named) fail("lanes that their mask does not name: %s", i.text.c_str());
    if (named & w.ended) fail("lanes have ended that others wait for: %s", i.text.c_str());
    if (named & ~arrived) {
      w.at_warp_sync |= lanes;
      return;
    }
    w.at_warp_sync &= ~arrived;
    if (i.flow == Flow::kShuffle) {
      i.execute(w, i, arrived);
    } else {
      ++w.barriers;
    }
    put(w, arrived, at + 1);
  }

  static void pass_barrier(Block& block) {
    const int at = block.warps[0]->at[0];
    for (Warp* w : block.warps) {
      for (int& lane_at : w->at)
        if (lane_at++ != at) fail("threads of a block meet at different barriers");
      w->at_barrier = 0;
    }
    block.arrived = 0;
    ++block.barriers;
  }

  static void pass_barrier(Cluster& cluster) {
    cluster.arrived = 0;
    ++cluster.phase;
    cluster.relaxed.push_back(false);
    for (Block* block : cluster.blocks)
      for (Warp* w : block->warps) w->at_cluster = 0;
  }

  static void wait_for_cluster(Warp& w, Mask lanes, int at) {
    each_lane(lanes, [&](int lane) {
      if (w.cluster_arrivals[lane] != w.cluster_waits[lane] + 1) fail("a wait for a cluster without an arrival");
      if (w.block->cluster->phase < w.cluster_arrivals[lane]) {
        w.at_cluster |= Mask{1} << lane;  // comes here again when the others have arrived
      } else {
        ++w.cluster_waits[lane];
        w.at[lane] = at + 1;
      }
    });
  }

  const Kernel& kernel_;
  const int blocks_, threads_, cluster_, at_once_;
  const uint32_t dynamic_shared_, shared_bytes_;
  std::vector<uint8_t> parameters_;
  const bool shuffled_;
  std::mt19937_64 random_;
  alignas(64) uint8_t grid_barrier_[64] = {};
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::vector<std::unique_ptr<Block>> resident_;
  std::vector<std::unique_ptr<Warp>> warps_;
};

}  // namespace emulator
