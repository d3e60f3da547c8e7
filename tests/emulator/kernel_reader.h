// Reads one kernel of PTX, as nvcc writes it. What is not understood is refused.
#pragma once

#include <cstdlib>
#include <memory>

#include "arithmetic.h"
#include "data_movement.h"
#include "text.h"

namespace emulator {

struct SharedVariable {
  uint32_t alignment, bytes;
  bool is_dynamic;
};
using SharedVariables = std::map<std::string, SharedVariable>;

// ".shared .align 4 .b8 name[64]", or with .extern before and no size.
inline void read_shared_variable(const std::string& statement, SharedVariables& into) {
  const size_t align = statement.find(".align"), type = statement.find(".b8"), bracket = statement.find('[');
  if (align == std::string::npos || type == std::string::npos || bracket == std::string::npos)
    fail("not understood: %s", statement.c_str());
  into[trimmed(statement.substr(type + 3, bracket - type - 3))] = {
      static_cast<uint32_t>(std::atoi(statement.c_str() + align + 6)),
      static_cast<uint32_t>(std::atoi(statement.c_str() + bracket + 1)), starts_with(statement, ".extern")};
}

class KernelReader {
 public:
  // `text` begins behind ".entry".
  KernelReader(const std::string& text, const SharedVariables& of_module) : shared_(of_module) {
    const size_t open = text.find('('), close = text.find(')', open), body = text.find('{', close);
    kernel_->name = trimmed(text.substr(0, open));
    for (const std::string& parameter : split(text.substr(open + 1, close - open - 1), ','))
      if (!parameter.empty()) read_parameter(parameter);
    if (const size_t bounds = text.find(".maxntid", close); bounds < body)
      kernel_->max_threads = std::atoi(text.c_str() + bounds + 8);
    read_body(text, body + 1);
    for (const auto& [index, label] : branches_) {
      if (!labels_.count(label)) fail("no label %s", label.c_str());
      kernel_->code[index].offset = labels_[label];
    }
    Instruction end;
    end.flow = Flow::kExit;
    end.text = "the end";
    kernel_->code.push_back(end);
  }

  std::unique_ptr<Kernel> take() { return std::move(kernel_); }

 private:
  struct Scope {
    std::map<std::string, Operand> registers;
    std::map<std::string, int> predicates;
  };

  void read_parameter(const std::string& text) {  // ".param .align 8 .b8 name[32]" or ".param .u64 name"
    std::string name = text.substr(text.find_last_of(" \t") + 1);
    uint32_t alignment, bytes;
    if (const size_t bracket = name.find('['); bracket != std::string::npos) {
      alignment = std::atoi(text.c_str() + text.find(".align") + 6);
      bytes = std::atoi(name.c_str() + bracket + 1);
      name.resize(bracket);
    } else {
      const size_t type = text.find('.', text.find(".param") + 6);
      alignment = bytes = std::atoi(text.c_str() + type + 2) / 8;
    }
    if (bytes == 0 || alignment == 0) fail("not understood: %s", text.c_str());
    const uint32_t offset = (kernel_->parameter_bytes + alignment - 1) / alignment * alignment;
    parameters_[name] = offset;
    kernel_->parameter_offsets.push_back(offset);
    kernel_->parameter_sizes.push_back(bytes);
    kernel_->parameter_bytes = offset + bytes;
  }

  void read_body(const std::string& text, size_t p) {
    scopes_.emplace_back();
    std::string statement;
    for (; !scopes_.empty(); ++p) {
      const char c = text[p];
      if (c == '{' && statement.empty()) {
        scopes_.emplace_back();
      } else if (c == '}' && statement.empty()) {
        scopes_.pop_back();
      } else if (c == ';') {
        read_statement(trimmed(statement));
        statement.clear();
      } else if (c == ':' && statement[0] == '$') {
        labels_[statement] = static_cast<int>(kernel_->code.size());
        statement.clear();
      } else if (!statement.empty() || !std::isspace(c)) {
        statement += std::isspace(c) ? ' ' : c;
      }
    }
  }

  void read_statement(std::string s) {
    if (s.empty() || starts_with(s, ".pragma")) return;
    if (starts_with(s, ".reg")) return declare_registers(s);
    if (starts_with(s, ".shared")) return read_shared_variable(s, shared_);
    Instruction i;
    i.text = s;
    if (s[0] == '@') {
      const size_t space = s.find(' ');
      i.guard_negated = s[1] == '!';
      i.guard = predicate(s.substr(1 + i.guard_negated, space - 1 - i.guard_negated));
      s = trimmed(s.substr(space));
    }
    const size_t space = std::min(s.find(' '), s.size());
    const std::string op = s.substr(0, space);
    const std::vector<std::string> operands =
        space == s.size() ? std::vector<std::string>{} : split(s.substr(space), ',');
    if (!read_instruction(op, operands, i)) fail("not understood: %s", i.text.c_str());
    kernel_->code.push_back(i);
  }

  // -------------------------------------------------------------------------------------------- operands

  void declare_registers(const std::string& s) {  // ".reg .b32 %r<12>" or ".reg .b16 low, high"
    const size_t type = s.find('.', 1), space = s.find(' ', type);
    const std::string kind = s.substr(type, space - type);
    for (const std::string& name : split(s.substr(space), ',')) {
      const size_t angle = name.find('<');
      const int count = angle == std::string::npos ? 1 : std::atoi(name.c_str() + angle + 1);
      for (int n = 0; n < count; ++n) {
        const std::string one = angle == std::string::npos ? name : name.substr(0, angle) + std::to_string(n);
        if (kind == ".pred") {
          scopes_.back().predicates[one] = kernel_->predicates++;
        } else {
          scopes_.back().registers[one] = new_register(ends_with(kind, "64"));
        }
      }
    }
  }

  Operand new_register(bool wide) {
    const Operand o{kernel_->register_bytes, false, wide};
    kernel_->register_bytes += kLanes * (wide ? 8 : 4);
    return o;
  }

  Operand constant(uint64_t value, bool wide) {
    Operand& o = constants_[{value, wide}];
    if (o.offset == 0) {
      o = {static_cast<uint32_t>(kernel_->constants.size()), true, wide};
      for (int lane = 0; lane < kLanes; ++lane)
        for (int byte = 0; byte < (wide ? 8 : 4); ++byte)
          kernel_->constants.push_back(static_cast<uint8_t>(value >> 8 * byte));
    }
    return o;
  }

  Operand special(const std::string& name, bool wide) {
    Operand& o = kernel_->special[name + (wide ? " wide" : "")];
    if (o.offset == 0) o = new_register(wide);
    return o;
  }

  int predicate(const std::string& name) const {
    for (size_t s = scopes_.size(); s-- > 0;)
      if (const auto found = scopes_[s].predicates.find(name); found != scopes_[s].predicates.end())
        return found->second;
    fail("no predicate %s", name.c_str());
  }

  const Operand* find_register(const std::string& name) const {
    for (size_t s = scopes_.size(); s-- > 0;)
      if (const auto found = scopes_[s].registers.find(name); found != scopes_[s].registers.end())
        return &found->second;
    return nullptr;
  }

  Operand shared_address(const std::string& name, bool wide) {
    const SharedVariable& variable = shared_[name];
    if (variable.is_dynamic) return special("dynamic shared memory", wide);
    const auto [place, is_new] = shared_offsets_.try_emplace(name, 0);
    if (is_new) {
      uint32_t& bytes = kernel_->static_shared_bytes;
      place->second = (bytes + variable.alignment - 1) / variable.alignment * variable.alignment;
      bytes = place->second + variable.bytes;
    }
    return constant(kSharedBase + place->second, wide);
  }

  // A register, a number, or the address of a parameter or a shared variable.
  Operand operand(const std::string& name, bool wide) {
    if (const Operand* found = find_register(name)) {
      if (found->wide != wide) fail("%s has another width", name.c_str());
      return *found;
    }
    if (name[0] == '%') return special(name, wide);
    if (starts_with(name, "0f")) return constant(std::strtoull(name.c_str() + 2, nullptr, 16), wide);
    if (name[0] == '-') return constant(static_cast<uint64_t>(std::strtoll(name.c_str(), nullptr, 0)), wide);
    if (std::isdigit(name[0])) return constant(std::strtoull(name.c_str(), nullptr, 0), wide);
    if (const auto found = parameters_.find(name); found != parameters_.end()) return constant(found->second, wide);
    if (shared_.count(name)) return shared_address(name, wide);
    fail("not understood: %s", name.c_str());
  }

  void read_address(const std::string& text, Instruction& i) {  // "[%rd1+8]", "[name]"
    const std::string inner = without_brackets(text);
    const size_t plus = std::min(inner.find('+'), inner.size());
    if (plus < inner.size()) i.offset = std::strtoll(inner.c_str() + plus + 1, nullptr, 0);
    const std::string base = trimmed(inner.substr(0, plus));
    const Operand* found = find_register(base);
    i.a = found ? *found : operand(base, false);
  }

  // "{%r1, %r2}" or one.
  void read_elements(const std::string& text, bool wide, Instruction& i) {
    const auto names = text[0] == '{' ? split(without_brackets(text), ',') : std::vector<std::string>{text};
    if (names.size() > 4) fail("more than four elements: %s", text.c_str());
    i.count = static_cast<int>(names.size());
    for (int e = 0; e < i.count; ++e) {
      const Operand* found = find_register(names[e]);
      i.elements[e] = found ? *found : operand(names[e], wide);
    }
  }

  // -------------------------------------------------------------------------------------------- instructions

  template <template <class> class Of>
  static Execute of_type(const std::string& type, const std::string& op) {
    if (type == "f32") return Of<float>::find(op);
    if (type == "f64") return Of<double>::find(op);
    if (type == "s16") return Of<int16_t>::find(op);
    if (type == "u16" || type == "b16") return Of<uint16_t>::find(op);
    if (type == "s32") return Of<int32_t>::find(op);
    if (type == "u32" || type == "b32") return Of<uint32_t>::find(op);
    if (type == "s64") return Of<int64_t>::find(op);
    if (type == "u64" || type == "b64") return Of<uint64_t>::find(op);
    return nullptr;
  }
  template <class T>
  struct Arithmetic {
    static Execute find(const std::string& op) { return arithmetic<T>(op); }
  };
  template <class T>
  struct Comparison {
    static Execute find(const std::string& op) { return comparison<T>(op); }
  };

  bool read_instruction(const std::string& op, const std::vector<std::string>& o, Instruction& i) {
    const std::vector<std::string> parts = split(op, '.');
    const std::string &name = parts[0], &type = parts.back();
    if (read_flow(op, o, i)) return true;
    if (name == "shfl") return read_shuffle(parts[2], o, i);
    if (name == "ld" || name == "st") return read_access(op, parts, o, i);
    if (name == "atom" || name == "red") return read_atomic(op, o, i);
    if (name == "cp") return read_copy(op, o, i);
    if (name == "mov" && type != "pred") return read_move(ends_with(type, "64"), o, i);
    if (name == "cvt") return read_conversion(op, parts, o, i);
    if (name == "setp" && parts.size() == 3) {
      const bool wide = ends_with(type, "64");
      i.predicate_to = predicate(o[0]), i.a = operand(o[1], wide), i.b = operand(o[2], wide);
      i.execute = of_type<Comparison>(type, parts[1]);
    } else if (name == "selp") {
      const bool wide = ends_with(type, "64");
      i.to = operand(o[0], wide), i.a = operand(o[1], wide), i.b = operand(o[2], wide);
      i.predicate_a = predicate(o[3]);
      i.execute = wide ? select<uint64_t> : select<uint32_t>;
    } else if (op == "mov.pred" && o[1][0] != '%') {
      i.predicate_to = predicate(o[0]);
      i.option = std::atoi(o[1].c_str());
      i.execute = LAMBDA(set_predicate(w, i.predicate_to, m, i.option ? ~0u : 0));
    } else if (type == "pred") {
      i.predicate_to = predicate(o[0]), i.predicate_a = predicate(o[1]);
      if (o.size() > 2) i.predicate_b = predicate(o[2]);
      i.execute = logic(name);
    } else if (starts_with(op, "createpolicy.")) {  // of caches
      i.to = operand(o[0], true), i.a = constant(0, true);
      i.execute = move<uint64_t>;
    } else if (op == "cvta.to.global.u64") {
      i.to = operand(o[0], true), i.a = operand(o[1], true);
      i.execute = move<uint64_t>;
    } else if (op == "mapa.shared::cluster.u32") {
      i.to = operand(o[0], false), i.a = operand(o[1], false), i.b = operand(o[2], false);
      i.execute = map_to_block;
    } else if (parts.size() >= 2 && o.size() >= 2) {
      const std::string stem = op.substr(0, op.size() - type.size() - 1);
      const bool wide = ends_with(type, "64"), product = name == "mul" && parts[1] == "wide" && ends_with(type, "32");
      const bool counts = name == "shl" || name == "shr" || name == "bfe";  // b and c are counts of bits
      i.to = operand(o[0], wide || product), i.a = operand(o[1], wide);
      if (o.size() > 2) i.b = operand(o[2], wide && !counts);
      if (o.size() > 3) i.c = operand(o[3], wide && !counts && name != "bfi");
      if (o.size() > 4) i.d = operand(o[4], false);
      i.execute = of_type<Arithmetic>(type, stem);
    }
    return i.execute != nullptr;
  }

  bool read_flow(const std::string& op, const std::vector<std::string>& o, Instruction& i) {
    if (op == "bra" || op == "bra.uni") {
      i.flow = Flow::kBranch;
      branches_.emplace_back(kernel_->code.size(), o[0]);
    } else if (op == "ret" || op == "exit") {
      i.flow = Flow::kExit;
    } else if (op == "trap") {
      i.flow = Flow::kTrap;
    } else if ((op == "bar.sync" || op == "barrier.sync") && o.size() == 1 && o[0] == "0") {
      i.flow = Flow::kBarrier;
    } else if (op == "bar.warp.sync") {
      i.flow = Flow::kWarpSync;
      i.d = operand(o[0], false);
    } else if (op == "barrier.cluster.arrive.release" || op == "barrier.cluster.arrive.relaxed") {
      i.flow = Flow::kClusterArrive;
      i.option = ends_with(op, "relaxed");
    } else if (op == "barrier.cluster.wait.acquire") {
      i.flow = Flow::kClusterWait;
    } else {
      return false;
    }
    return true;
  }

  bool read_shuffle(const std::string& kind, const std::vector<std::string>& o, Instruction& i) {
    const size_t bar = std::min(o[0].find('|'), o[0].size());
    i.flow = Flow::kShuffle;
    i.option = kind[0];
    i.to = operand(o[0].substr(0, bar), false);
    if (bar < o[0].size()) i.predicate_to = predicate(o[0].substr(bar + 1));
    i.a = operand(o[1], false), i.b = operand(o[2], false), i.c = operand(o[3], false), i.d = operand(o[4], false);
    i.execute = shuffle;
    return true;
  }

  bool read_access(const std::string& op, const std::vector<std::string>& parts, const std::vector<std::string>& o,
                   Instruction& i) {
    const bool loads = parts[0] == "ld";
    const std::string &type = parts.back(), &vector = parts[parts.size() - 2];
    const bool wide = ends_with(type, "64");
    // An address without a space is generic: here always in global memory.
    i.space = contains(op, ".shared::cluster") ? Space::kSharedOfCluster
              : contains(op, ".shared")        ? Space::kShared
              : contains(op, ".param")         ? Space::kParameter
                                               : Space::kGlobal;
    if (contains(op, ".local") || contains(op, ".const")) return false;
    read_address(o[!loads ? 0 : 1], i);
    read_elements(o[loads ? 0 : 1], wide, i);
    if (i.count != (vector == "v4" ? 4 : vector == "v2" ? 2 : 1)) return false;
    const int bits = std::atoi(type.c_str() + 1);
    if (type[0] == 's' && loads) {
      i.execute = bits == 8    ? load<int8_t>
                  : bits == 16 ? load<int16_t>
                  : bits == 32 ? load<int32_t>
                  : bits == 64 ? load<int64_t>
                               : nullptr;
    } else if (loads) {
      i.execute = bits == 8    ? load<uint8_t>
                  : bits == 16 ? load<uint16_t>
                  : bits == 32 ? load<uint32_t>
                  : bits == 64 ? load<uint64_t>
                               : nullptr;
    } else {
      i.execute = bits == 8    ? store<uint8_t>
                  : bits == 16 ? store<uint16_t>
                  : bits == 32 ? store<uint32_t>
                  : bits == 64 ? store<uint64_t>
                               : nullptr;
    }
    return i.execute != nullptr;
  }

  bool read_atomic(const std::string& op, const std::vector<std::string>& o, Instruction& i) {
    const bool returns = starts_with(op, "atom");
    if (!contains(op, ".add") || !ends_with(op, ".u32") || contains(op, ".shared")) return false;
    if (returns) i.to = operand(o[0], false);
    read_address(o[returns], i);
    i.b = operand(o[returns + 1], false);
    i.execute = atomic_add;
    return true;
  }

  bool read_copy(const std::string& op, const std::vector<std::string>& o, Instruction& i) {
    if (op == "cp.async.wait_all") {
      i.execute = wait_for_copies;
    } else if (op == "cp.async.cg.shared.global" || op == "cp.async.ca.shared.global") {
      i.space = Space::kShared;
      i.to = operand(without_brackets(o[0]), false), i.a = operand(without_brackets(o[1]), true);
      i.option = std::atoi(o[2].c_str());
      if (o.size() > 3) i.b = operand(o[3], false);
      i.execute = copy_async;
    }
    return i.execute != nullptr;
  }

  bool read_move(bool wide, const std::vector<std::string>& o, Instruction& i) {
    if (o[0][0] == '{') {
      read_elements(o[0], false, i);
      i.a = operand(o[1], wide);
      i.execute = unpack;
    } else if (o[1][0] == '{') {
      read_elements(o[1], false, i);
      i.to = operand(o[0], wide);
      i.execute = pack;
    } else {
      i.to = operand(o[0], wide), i.a = operand(o[1], wide);
      i.execute = wide ? move<uint64_t> : move<uint32_t>;
    }
    i.option = (wide ? 8 : 4) / i.count;
    return true;
  }

  bool read_conversion(const std::string& op, const std::vector<std::string>& parts, const std::vector<std::string>& o,
                       Instruction& i) {
    const std::string &to = parts[parts.size() - 2], &from = parts.back();
    const bool from_wide = ends_with(from, "64");
    const Operand* source = find_register(o[1]);
    if (source && source->wide && !from_wide) {  // the low half of a wide register
      Instruction low = i;
      low.a = *source, low.to = i.a = new_register(false);
      low.execute = low_half;
      kernel_->code.push_back(low);
    } else {
      i.a = operand(o[1], from_wide);
    }
    if (o.size() > 2) i.b = operand(o[2], false);
    i.to = operand(o[0], ends_with(to, "64"));
    i.execute = conversion(op.substr(4), to, from);
    return i.execute != nullptr;
  }

  std::unique_ptr<Kernel> kernel_ = std::make_unique<Kernel>();
  SharedVariables shared_;
  std::map<std::string, uint32_t> parameters_, shared_offsets_;
  std::vector<Scope> scopes_;
  std::map<std::string, int> labels_;
  std::vector<std::pair<size_t, std::string>> branches_;  // instruction, label
  std::map<std::pair<uint64_t, bool>, Operand> constants_;
};

}  // namespace emulator
